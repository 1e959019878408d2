// A cell bound to the parameters of one layer, for calls that pay little besides the kernel: everything that the
// ordinary way checks in Python was checked when it was bound, and what may have changed since is compared here.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "cell/native.h"
#include "common/dlpack.h"

namespace rmc {
namespace {

// A parameter as it was when bound.
class Seen {
 public:
  explicit Seen(const DLTensor& t) : data_(t.begin()), dtype_(t.dtype), shape_(t.shape, t.shape + t.ndim) {}

  bool same(const DLTensor& t) const {
    return t.begin() == data_ && t.dtype == dtype_ && t.ndim == static_cast<int32_t>(shape_.size()) &&
           std::memcmp(t.shape, shape_.data(), shape_.size() * sizeof(int64_t)) == 0 && t.contiguous();
  }

 private:
  const void* data_;
  DLDataType dtype_;
  std::vector<int64_t> shape_;
};

// places: (dictionary, key, value) for every module and parameter on the way to the parameters.
// Objects are borrowed: who holds this holds them too. Owned here, they would hide cycles from Python's collector.
class BoundCell {
 public:
  BoundCell(const py::capsule& api, const py::tuple& params, const py::tuple& places) {
    if (std::strcmp(api.name(), kDlpackCapsule) != 0) throw std::invalid_argument("api: not an exchange API of DLPack");
    for (api_ = api.get_pointer<DLPackExchangeAPI>(); api_ && api_->major != kDlpackMajor;) api_ = api_->previous;
    if (!api_ || !api_->borrow) throw std::invalid_argument("api: no version that is known here");
    for (py::handle param : params) {
      DLTensor t;
      if (!borrow(*api_, param.ptr(), t) || t.device.type != kDlCpu || !t.contiguous())
        throw std::invalid_argument("params: takes contiguous tensors on the CPU");
      params_.push_back(param.ptr());
      seen_.emplace_back(t);
      addresses_.push_back(t.begin());
      float32_ = float32_ && t.dtype == kDlFloat32;
    }
    for (py::handle item : places) {
      const auto place = item.cast<py::tuple>();
      places_.push_back({place[0].cast<py::dict>().ptr(), py::object(place[1]).ptr(), py::object(place[2]).ptr()});
    }
  }

  // Whether the parameters still are the tensors they were, where they were, and, with `versions`, whether torch
  // counted no write to them since it gave these numbers (None for a tensor without).
  bool holds(const py::tuple* versions) const {
    for (const Place& place : places_) {
      PyObject* found = PyDict_GetItemWithError(place.dictionary, place.key);
      if (found != place.value) return PyErr_Clear(), false;
    }
    DLTensor t;
    for (size_t i = 0; i < params_.size(); i++) {
      if (!borrow(*api_, params_[i], t) || !seen_[i].same(t)) return false;
      if (versions && !same_version(params_[i], PyTuple_GET_ITEM(versions->ptr(), i))) return false;
    }
    return true;
  }

  // Runs forward where all is as it was and x and memory are contiguous float32 tensors on the CPU that fit; false
  // where not. memories [B, T, N, D], or [B, N, D] for one step, is contiguous and float32 by the caller's care.
  // Packed weights stand for parameters of these versions; without them the parameters must be float32.
  bool forward(const Cell& cell, const py::object& x, const py::object& memory, const py::object& memories,
               const PackedWeights* packed, const py::tuple& versions, int threads) const {
    const Plan& plan = cell.plan();
    DLTensor in, from, to;
    if (static_cast<int64_t>(params_.size()) != plan.params || !(packed || float32_)) return false;
    if (packed && versions.size() != params_.size()) throw std::invalid_argument("versions: one per parameter");
    if (!holds(packed ? &versions : nullptr)) return false;
    if (!reads(x, in) || !reads(memory, from) || !reads(memories, to)) return false;
    if (from.ndim != 3 || from.shape[1] != plan.N || from.shape[2] != plan.D) return false;
    CellInputs call;
    call.batch = from.shape[0];
    call.steps = to.ndim == 4 ? to.shape[1] : 1;
    if (call.batch == 0 || call.steps == 0) return false;
    if (!leads(to, call, to.ndim == 4) || to.shape[to.ndim - 2] != plan.N || to.shape[to.ndim - 1] != plan.D)
      return false;
    const bool matrix = in.ndim == to.ndim;
    if (!leads(in, call, to.ndim == 4) || in.shape[in.ndim - 1] != plan.I) return false;
    if (matrix ? in.shape[in.ndim - 2] != plan.n : plan.n != 1 || in.ndim != to.ndim - 1) return false;
    call.threads = threads;
    call.x = in.begin(), call.memory = from.begin(), call.memories = to.begin();
    call.params = addresses_.data();
    cell.run(call, packed);
    return true;
  }

 private:
  struct Place {
    PyObject *dictionary, *key, *value;
  };

  bool same_version(PyObject* param, PyObject* version) const {
    if (version == Py_None) return true;
    const py::object now = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, version_name_.ptr()));
    const int same = now ? PyObject_RichCompareBool(now.ptr(), version, Py_EQ) : -1;
    PyErr_Clear();
    return same == 1;
  }
  bool reads(const py::object& tensor, DLTensor& out) const {
    return borrow(*api_, tensor.ptr(), out) && out.device.type == kDlCpu && out.dtype == kDlFloat32 && out.contiguous();
  }
  // Whether the leading axes are those of the call.
  static bool leads(const DLTensor& t, const CellInputs& call, bool sequence) {
    return t.ndim > (sequence ? 2 : 1) && t.shape[0] == call.batch && (!sequence || t.shape[1] == call.steps);
  }

  const DLPackExchangeAPI* api_ = nullptr;
  std::vector<PyObject*> params_;
  std::vector<Seen> seen_;
  std::vector<const void*> addresses_;
  std::vector<Place> places_;
  const py::object version_name_ = py::reinterpret_steal<py::object>(PyUnicode_InternFromString("_version"));
  bool float32_ = true;
};

}  // namespace

void register_bound_cell(py::module_& m) {
  py::class_<BoundCell>(m, "BoundCell", "A cell bound to the parameters of one layer.")
      .def(py::init<const py::capsule&, const py::tuple&, const py::tuple&>(), py::arg("api"), py::arg("params"),
           py::arg("places"))
      .def("forward", &BoundCell::forward);
}

}  // namespace rmc
