// A cell bound to the parameters of one layer, for calls that pay little besides the kernel: everything that the
// ordinary way checks in Python was checked when it was bound, and what may have changed since is compared here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "cell/native.h"
#include "cell/relied_on.h"
#include "common/dlpack.h"

namespace rmc {
namespace {

template <class T>
std::vector<T> each(const py::object& items) {
  std::vector<T> out;
  for (py::handle item : items) out.emplace_back(item.cast<py::tuple>());
  return out;
}

// Of frozen weights what there is until a block of them opens or closes. A call holds what it began with: others may
// look anew meanwhile, since much of a call lets other threads run.
struct Frozen {
  py::object change;                     // `weights.change` before the rest was read
  py::object pack, versions;             // None without a block of these parameters
  py::object packed[2];                  // made at the first call that wants it
  const PackedWeights* weights[2] = {};  // what those hold

  bool open() const { return !versions.is_none(); }
};

class BoundCell {
 public:
  // See `bound.BoundLayer`, the only caller, which holds the dictionary for as long as this lives.
  explicit BoundCell(const py::dict& config)
      : places_(each<Place>(config["places"])),
        questions_(each<Question>(config["questions"])),
        types_(config["types"].cast<py::tuple>()),
        cell_objects_(config["cells"].cast<py::tuple>()),
        large_(config["large"].cast<int64_t>()),
        matrix_(config["matrix"].cast<bool>()),
        views_(config["views"].cast<bool>()),
        change_(config["change"].cast<py::tuple>()),
        look_(config["look"].ptr()),
        get_num_threads_(config["get_num_threads"].ptr()),
        empty_like_(config["empty_like"].ptr()) {
    for (py::handle cell : cell_objects_) cells_.push_back(cell.cast<const Cell*>());
    if (cells_.size() != 2) throw std::invalid_argument("cells: takes two, for few and for many memory rows");
    width_ = py::int_(cells_[0]->plan().N * cells_[0]->plan().D);
    const auto api = config["api"].cast<py::capsule>();
    if (std::strcmp(api.name(), kDlpackCapsule) != 0) throw std::invalid_argument("api: not an exchange API of DLPack");
    for (api_ = api.get_pointer<DLPackExchangeAPI>(); api_ && api_->major != kDlpackMajor;) api_ = api_->previous;
    if (!api_ || !api_->borrow) throw std::invalid_argument("api: no version that is known here");
    for (py::handle dictionary : config["empty"]) {
      if (!PyDict_Check(dictionary.ptr())) throw py::type_error("empty: takes dictionaries");
      empty_.push_back(dictionary.ptr());
    }
    for (py::handle param : config["params"]) {
      params_.emplace_back(*api_, param);
      addresses_.push_back(params_.back().data());
    }
    if (params_.empty()) throw std::invalid_argument("params: takes at least one");
    float32_ = params_[0].dtype() == kDlFloat32;
    for (const Parameter& param : params_) {
      if (!(param.dtype() == params_[0].dtype())) throw std::invalid_argument("params: takes tensors of one dtype");
    }
    const py::object version = config["version"];
    if (!Py_IS_TYPE(version.ptr(), &PyGetSetDescr_Type)) throw std::invalid_argument("version: takes a descriptor");
    version_ = reinterpret_cast<PyGetSetDescrObject*>(version.ptr())->d_getset;
    look();
  }

  // The output if it is a view of the memories, else None, and the memories [B, N, D], or [B, T, N, D] of a sequence.
  // None where the ordinary way is to serve or refuse the call.
  py::object step(const py::object& x, const py::object& memory, bool sequence) {
    if (!plain(x) || !plain(memory) || !holds()) return py::none();
    const std::shared_ptr<Frozen> frozen = frozen_;
    DLTensor in, from, to;
    if (!on_cpu(x, in) || !on_cpu(memory, from) || !(in.dtype == params_[0].dtype()) || !(from.dtype == kDlFloat32))
      return py::none();
    const Plan& few = cells_[0]->plan();
    if (from.ndim != 3 || from.shape[1] != few.N || from.shape[2] != few.D) return py::none();
    if (in.ndim < 2 || in.shape[in.ndim - 1] != few.I || in.shape[0] != from.shape[0]) return py::none();
    CellInputs call;
    call.batch = from.shape[0];
    call.steps = sequence ? in.shape[1] : 1;
    const int32_t axes = sequence ? 3 : 2;
    if (in.ndim != axes + matrix_ || (matrix_ && in.shape[axes - 1] != few.n)) return py::none();
    if (call.batch == 0 || call.steps == 0) return py::none();

    const py::object rows = read(float32_ ? x : x.attr("float")(), in), start = read(memory, from);
    if (!rows || !start) return py::none();
    const py::object memories = sequence
                                    ? start.attr("new_empty")(py::make_tuple(call.batch, call.steps, few.N, few.D))
                                    : py::reinterpret_steal<py::object>(PyObject_CallOneArg(empty_like_, start.ptr()));
    if (!memories) throw py::error_already_set();
    if (!on_cpu(memories, to) || !(to.dtype == kDlFloat32) || !to.contiguous()) return py::none();
    const bool large = call.batch * few.N >= large_;
    call.x = in.begin(), call.memory = from.begin(), call.memories = to.begin();
    call.params = addresses_.data();
    call.threads = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(get_num_threads_)).cast<int>();
    if (frozen->open() && !frozen->weights[large]) {
      frozen->packed[large] = frozen->pack(cell_objects_[large]);
      frozen->weights[large] = frozen->packed[large].cast<const PackedWeights*>();
    }
    cells_[large]->run(call, frozen->weights[large]);
    if (!views_) return py::make_tuple(py::none(), memories);
    const py::int_ elements(call.batch), steps(call.steps);
    const auto output =
        sequence ? method(memories, view_, elements, steps, width_) : method(memories, view_, elements, width_);
    return py::make_tuple(float32_ ? output : output.attr("to")(x.attr("dtype")), memories);
  }

 private:
  bool plain(const py::object& tensor) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    for (py::handle known : types_) {
      if (known.ptr() == type) return true;
    }
    return false;
  }

  void look() {
    const auto found = py::handle(look_)().cast<py::tuple>();
    auto frozen = std::make_shared<Frozen>();
    frozen->change = found[0], frozen->pack = found[1], frozen->versions = found[2];
    if (frozen->open() && py::len(frozen->versions) != params_.size())
      throw std::invalid_argument("versions: takes one per parameter");
    frozen_ = std::move(frozen);
  }

  bool holds() {
    for (const Place& place : places_) {
      if (!place.holds()) return false;
    }
    for (PyObject* dictionary : empty_) {
      if (PyDict_GET_SIZE(dictionary) != 0) return false;
    }
    for (const Question& question : questions_) {
      if (!question.holds()) return false;
    }
    if (!Place(change_[0], change_[1], frozen_->change).holds()) look();
    if (!frozen_->open()) {  // read are packed weights, or float32
      return float32_ && std::all_of(params_.begin(), params_.end(), [&](const auto& p) { return p.holds(*api_); });
    }
    for (size_t i = 0; i < params_.size(); i++) {
      PyObject* const version = PyTuple_GET_ITEM(frozen_->versions.ptr(), static_cast<Py_ssize_t>(i));
      if (!params_[i].lies_there(*api_) || !params_[i].has_version(*version_, version)) return false;
    }
    return true;
  }

  bool on_cpu(const py::object& tensor, DLTensor& out) const {
    return borrow(*api_, tensor.ptr(), out) && out.device.type == kDlCpu && out.data;
  }
  // The tensor as plain memory, and where that is; null for one whose sign is to be flipped, which is rare.
  py::object read(py::object tensor, DLTensor& out) const {
    if (method(tensor, is_neg_).ptr() != Py_False) return {};
    if (!out.contiguous()) tensor = method(tensor, contiguous_);
    return on_cpu(tensor, out) && out.dtype == kDlFloat32 ? tensor : py::object();
  }
  template <class... Arguments>
  static py::object method(const py::object& tensor, const py::object& name, const Arguments&... arguments) {
    PyObject* const given[] = {tensor.ptr(), arguments.ptr()...};
    auto result = py::reinterpret_steal<py::object>(
        PyObject_VectorcallMethod(name.ptr(), given, sizeof...(arguments) + 1, nullptr));
    if (!result) throw py::error_already_set();
    return result;
  }
  static py::object interned(const char* name) {
    return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name));
  }

  const DLPackExchangeAPI* api_ = nullptr;
  std::vector<Parameter> params_;
  std::vector<const void*> addresses_;
  std::vector<Place> places_;
  std::vector<PyObject*> empty_;  // dictionaries
  std::vector<Question> questions_;
  py::tuple types_, cell_objects_;
  std::vector<const Cell*> cells_;
  int64_t large_;  // memory rows from which on the second cell is run
  bool matrix_, views_;
  py::tuple change_;  // (dictionary, key) of `weights.change`
  PyObject *look_, *get_num_threads_, *empty_like_;
  std::shared_ptr<Frozen> frozen_;
  bool float32_ = true;
  const PyGetSetDef* version_;
  const py::object is_neg_ = interned("is_neg"), contiguous_ = interned("contiguous"), view_ = interned("view");
  py::int_ width_;  // of the output where that is a view
};

}  // namespace

void register_bound_cell(py::module_& m) {
  py::class_<BoundCell>(m, "BoundCell", "A cell bound to the parameters of one layer.")
      .def(py::init<const py::dict&>(), py::arg("config"))
      .def("step", &BoundCell::step);
}

}  // namespace rmc
