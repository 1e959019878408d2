// A cell bound to the parameters of one layer, for calls that pay little besides the kernel: everything that the
// ordinary way checks in Python was checked when it was bound, and what may have changed since is compared here.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "common/profile.h"
#include "python/bindings.h"
#include "python/dlpack.h"
#include "python/native.h"
#include "python/new_tensor.h"
#include "python/relied_on.h"

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
      : places_(by_dictionary(config["places"])),
        questions_(each<Question>(config["questions"])),
        types_(each<Type>(config["types"])),
        attributes_(each<Attribute>(config["attributes"])),
        is_neg_(config["is_neg"]),
        data_ptr_(config["data_ptr"]),
        owner_(config["owner"].ptr()),
        plain_types_(config["plain_types"].cast<py::tuple>()),
        cell_objects_(config["cells"].cast<py::tuple>()),
        large_(config["large"].cast<int64_t>()),
        matrix_(config["matrix"].cast<bool>()),
        flat_(config["flat"].cast<bool>()),
        change_(config["change"].cast<py::tuple>()),
        look_(config["look"].ptr()),
        get_num_threads_(config["get_num_threads"].ptr()) {
    for (py::handle cell : cell_objects_) cells_.push_back(cell.cast<const Cell*>());
    if (cells_.size() != 2) throw std::invalid_argument("cells: takes two, for few and for many memory rows");
    const auto api = config["api"].cast<py::capsule>();
    if (std::strcmp(api.name(), kDlpackCapsule) != 0) throw std::invalid_argument("api: not an exchange API of DLPack");
    for (api_ = api.get_pointer<DLPackExchangeAPI>(); api_ && api_->major != kDlpackMajor;) api_ = api_->previous;
    if (!api_ || !api_->borrow || !api_->to_object) throw std::invalid_argument("api: no version that is known here");
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

  // The memories, their last two axes as one where the output is that, and the final memory. None where the ordinary
  // way is to serve or refuse the call: `owner` may be a copy of the layer that was bound.
  py::object step(const py::object& owner, const py::object& x, const py::object& memory, bool sequence) {
    if (owner.ptr() != owner_ || !plain(x) || !plain(memory)) return py::none();
    const std::shared_ptr<Frozen> frozen = holds();
    if (!frozen) return py::none();
    DLTensor in, from;
    if (!on_cpu(x, in) || !on_cpu(memory, from) || !(in.dtype == params_[0].dtype()) || !(from.dtype == kDlFloat32))
      return py::none();
    const Plan& few = cells_[0]->plan();
    const int64_t N = few.N, D = few.D;
    if (from.ndim != 3 || from.shape[1] != N || from.shape[2] != D) return py::none();
    if (in.ndim < 2 || in.shape[in.ndim - 1] != few.I || in.shape[0] != from.shape[0]) return py::none();
    CellInputs call;
    call.batch = from.shape[0];
    call.steps = sequence ? in.shape[1] : 1;
    const int32_t axes = sequence ? 3 : 2;
    if (in.ndim != axes + matrix_ || (matrix_ && in.shape[axes - 1] != few.n)) return py::none();
    if (call.batch == 0 || call.steps == 0) return py::none();

    const py::object rows = read(float32_ ? x : x.attr("float")(), in), start = read(memory, from);
    if (!rows || !start) return py::none();
    const int64_t B = call.batch, T = call.steps;
    const auto of_steps = [&](auto... sizes) {
      return sequence ? new_tensor(*api_, {B, T, sizes...}) : new_tensor(*api_, {B, sizes...});
    };
    const NewTensor memories = flat_ ? of_steps(N * D) : of_steps(N, D), final_memory = new_tensor(*api_, {B, N, D});
    if (!memories.object || !final_memory.object) return py::none();
    const bool large = B * N >= large_;
    call.x = in.begin(), call.memory = from.begin();
    call.memories = memories.data, call.final_memory = final_memory.data;
    call.params = addresses_.data();
    call.threads = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(get_num_threads_)).cast<int>();
    if (frozen->open() && !frozen->weights[large]) {
      frozen->packed[large] = frozen->pack(cell_objects_[large]);
      frozen->weights[large] = frozen->packed[large].cast<const PackedWeights*>();
    }
    {
      const StepClock clock;
      cells_[large]->run(call, frozen->weights[large]);
    }
    const bool convert = flat_ && !float32_;
    return py::make_tuple(convert ? memories.object.attr("to")(x.attr("dtype")) : memories.object, final_memory.object);
  }

 private:
  bool plain(const py::object& tensor) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    for (py::handle known : plain_types_) {
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

  // What there is of frozen weights, null where something is not as it was.
  std::shared_ptr<Frozen> holds() {
    for (Places& places : places_) {
      if (!places.holds()) return nullptr;
    }
    for (PyObject* dictionary : empty_) {
      if (PyDict_GET_SIZE(dictionary) != 0) return nullptr;
    }
    for (const Type& type : types_) {
      if (!type.holds()) return nullptr;
    }
    for (const Attribute& attribute : attributes_) {
      if (!attribute.holds()) return nullptr;
    }
    for (const Question& question : questions_) {
      if (!question.holds()) return nullptr;
    }
    if (!Place(change_[0], change_[1], frozen_->change).holds()) look();
    const std::shared_ptr<Frozen> frozen = frozen_;  // another thread may look meanwhile
    if (!frozen->open()) {                           // read are packed weights, or float32
      const bool same = std::all_of(params_.begin(), params_.end(), [&](const auto& p) { return p.holds(*api_); });
      return float32_ && same ? frozen : nullptr;
    }
    for (size_t i = 0; i < params_.size(); i++) {
      PyObject* const version = PyTuple_GET_ITEM(frozen->versions.ptr(), static_cast<Py_ssize_t>(i));
      if (!params_[i].lies_there(data_ptr_) || !params_[i].has_version(*version_, version)) return nullptr;
    }
    return frozen;
  }

  bool on_cpu(const py::object& tensor, DLTensor& out) const {
    return borrow(*api_, tensor.ptr(), out) && out.device.type == kDlCpu && out.data;
  }
  // The tensor as plain memory, and where that is; null for one whose sign is to be flipped, which is rare.
  py::object read(py::object tensor, DLTensor& out) const {
    if (is_neg_(tensor.ptr()).ptr() != Py_False) return {};
    if (!out.contiguous()) tensor = tensor.attr("contiguous")();
    return on_cpu(tensor, out) && out.dtype == kDlFloat32 ? tensor : py::object();
  }

  const DLPackExchangeAPI* api_ = nullptr;
  std::vector<Parameter> params_;
  std::vector<const void*> addresses_;
  std::vector<Places> places_;
  std::vector<PyObject*> empty_;  // dictionaries
  std::vector<Question> questions_;
  std::vector<Type> types_;
  std::vector<Attribute> attributes_;
  TensorMethod is_neg_, data_ptr_;
  PyObject* owner_;
  py::tuple plain_types_, cell_objects_;
  std::vector<const Cell*> cells_;
  int64_t large_;  // memory rows from which on the second cell is run
  bool matrix_, flat_;
  py::tuple change_;  // (dictionary, key) of `weights.change`
  PyObject *look_, *get_num_threads_;
  std::shared_ptr<Frozen> frozen_;
  bool float32_ = true;
  const PyGetSetDef* version_;
};

constexpr const char* kBoundCell = "BoundCell";

// A plain C function: pybind11's way to one takes 0.3 us more.
PyObject* call_step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != 4) throw py::type_error("step: takes owner, x, memory, sequence");
    auto* bound = static_cast<BoundCell*>(PyCapsule_GetPointer(self, kBoundCell));
    const auto given = [&](int i) { return py::reinterpret_borrow<py::object>(arguments[i]); };
    return bound->step(given(0), given(1), given(2), arguments[3] == Py_True).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef step_method = {"step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call_step)),
                           METH_FASTCALL, nullptr};

py::object bound_step(const py::dict& config) {
  auto bound = std::make_unique<BoundCell>(config);
  const py::capsule self(bound.get(), kBoundCell, [](PyObject* capsule) {
    delete static_cast<BoundCell*>(PyCapsule_GetPointer(capsule, kBoundCell));
  });
  bound.release();
  return py::reinterpret_steal<py::object>(PyCFunction_New(&step_method, self.ptr()));
}

}  // namespace

void register_bound_cell(py::module_& m) {
  m.def("bound_step", &bound_step, py::arg("config"), "The step of a cell bound to the parameters of one layer.");
}

}  // namespace rmc
