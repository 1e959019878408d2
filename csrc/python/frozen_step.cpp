// One step of a cell with packed weights, for loops that act: one call checks x, memory and resets, and runs. What this
// file does not know (another dtype, device or subclass, a tracer, an error to explain) is left to `ordinary`.
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "python/bindings.h"
#include "python/dlpack.h"
#include "python/native.h"
#include "python/tensors.h"

namespace rmc {
namespace {

class FrozenStep {
 public:
  // See `rmc_kernels.frozen`, the only caller.
  explicit FrozenStep(const py::dict& config)
      : ordinary_(config["ordinary"]),
        pack_(config["pack"]),
        get_num_threads_(config["get_num_threads"]),
        initial_(config["initial"]),
        tensors_(config["tensors"].cast<Tensors>()),
        quiet_(config["quiet"].cast<py::tuple>()),
        many_rows_(config["many_rows"].cast<int64_t>()),
        flat_(config["flat"].cast<bool>()),
        matrix_(config["matrix"].cast<bool>()) {
    const auto cells = config["cells"].cast<py::tuple>();
    if (cells.size() != 2) throw std::invalid_argument("cells must be two, for few and for many memory rows");
    for (int i = 0; i < 2; i++) cells_[i] = {cells[i], cells[i].cast<const Cell*>(), {}, nullptr};
    DLTensor parameter;
    if (!tensors_.borrow(py::object(config["parameter"]).ptr(), parameter))
      throw std::invalid_argument("parameter must be a tensor");
    dtype_ = parameter.dtype, widen_ = !(dtype_ == kDlFloat32);
    if (!initial_.is_none() &&
        (!tensors_.borrow(initial_.ptr(), initial_memory_) || !lies_plain(initial_memory_, kDlFloat32, 2)))
      throw std::invalid_argument("initial must be a contiguous float32 tensor [N, D] on the CPU");
  }

  // Output and memory, [B, N * D] in x's dtype if `flat`, else [B, N, D], and [B, N, D]. Each has memory of its own.
  py::object operator()(const py::object& x, const py::object& memory, const py::object& resets) {
    DLTensor rows, from, flags;
    CellInputs call;
    call.steps = 1;
    const Plan& plan = cells_[0].cell->plan();
    if (!nothing_watches()) return ordinary_(x, memory, resets);
    const py::object input = plain(x, dtype_, 2 + matrix_, rows);
    if (!input || rows.shape[0] == 0 || rows.shape[rows.ndim - 1] != plan.I || (matrix_ && rows.shape[1] != plan.n))
      return ordinary_(x, memory, resets);
    call.batch = rows.shape[0], call.x = rows.begin();

    if (initial_.is_none() && (memory.is_none() || !resets.is_none())) return ordinary_(x, memory, resets);
    py::object start, starts_over;
    if (memory.is_none()) {
      call.memory = initial_memory_.begin(), call.one_memory = true;
    } else {
      start = plain(memory, kDlFloat32, 3, from);
      if (!start || from.shape[0] != call.batch || from.shape[1] != plan.N || from.shape[2] != plan.D)
        return ordinary_(x, memory, resets);
      call.memory = from.begin();
    }
    if (!resets.is_none()) {
      starts_over = plain(resets, kDlBool, 1, flags);
      if (!starts_over || flags.shape[0] != call.batch) return ordinary_(x, memory, resets);
      call.resets = reinterpret_cast<const bool*>(flags.begin());
      call.reset_memory = initial_memory_.begin(), call.one_reset_memory = true;
    }

    const int64_t B = call.batch, N = plan.N, D = plan.D;
    const NewTensor output = flat_ ? tensors_.make(kDlFloat32, {B, N * D}) : tensors_.make(kDlFloat32, {B, N, D});
    const NewTensor final_memory = tensors_.make(kDlFloat32, {B, N, D});
    if (!output.object || !final_memory.object) return ordinary_(x, memory, resets);  // raises torch's error
    call.memories = output.data, call.final_memory = final_memory.data;
    call.threads = checked(PyObject_CallNoArgs(get_num_threads_.ptr())).cast<int>();
    Packed& packed = cells_[B * N >= many_rows_];
    if (!packed.weights) {  // two threads may both pack: the second copy replaces the first, which its user holds
      const py::object fresh = pack_(packed.object);
      packed.weights = fresh.cast<const PackedWeights*>(), packed.owner = fresh;
    }
    const py::object held = packed.owner;
    packed.cell->run(call, packed.weights, 0, 0);
    return py::make_tuple(flat_ && widen_ ? output.object.attr("to")(x.attr("dtype")) : output.object,
                          final_memory.object);
  }

 private:
  struct Packed {
    py::object object;
    const Cell* cell;
    py::object owner;
    const PackedWeights* weights;
  };

  bool nothing_watches() const {
    for (py::handle item : quiet_) {
      PyObject* question = item.ptr();
      const py::object found = checked(PyObject_CallNoArgs(PyTuple_GET_ITEM(question, 0)));
      if (found.ptr() != PyTuple_GET_ITEM(question, 1)) return false;
    }
    return true;
  }

  // The tensor, or a copy of it, as contiguous memory of what C++ reads in place of `dtype`; null where it is none.
  py::object plain(py::object tensor, DLDataType dtype, int32_t axes, DLTensor& out) const {
    if (!tensors_.read(tensor.ptr(), out) || !(out.dtype == dtype)) return {};
    const bool widens = dtype == dtype_ && widen_;
    if (widens) tensor = tensor.attr("float")();
    if (!out.contiguous()) tensor = tensor.attr("contiguous")();
    if (!tensors_.borrow(tensor.ptr(), out) || !lies_plain(out, widens ? kDlFloat32 : dtype, axes)) return {};
    return tensor;
  }
  static bool lies_plain(const DLTensor& t, DLDataType dtype, int32_t axes) {
    return t.device.type == kDlCpu && t.data && t.ndim == axes && t.dtype == dtype && t.contiguous();
  }

  py::object ordinary_, pack_, get_num_threads_, initial_;
  Tensors tensors_;
  py::tuple quiet_;  // (function, what it answers where nothing traces or transforms)
  int64_t many_rows_;
  bool flat_, matrix_, widen_ = false;
  DLDataType dtype_{};  // of x and the parameters
  DLTensor initial_memory_{};
  Packed cells_[2];
};

constexpr const char* kFrozenStep = "rmc_kernels.FrozenStep";

// A plain C function: pybind11's way to one takes 0.3 us more.
PyObject* call_step(PyObject* self, PyObject* const* arguments, Py_ssize_t count) {
  try {
    if (count != 3) throw py::type_error("step must be given x, memory and resets");
    auto& step = *static_cast<FrozenStep*>(PyCapsule_GetPointer(self, kFrozenStep));
    const auto given = [&](int i) { return py::reinterpret_borrow<py::object>(arguments[i]); };
    return step(given(0), given(1), given(2)).release().ptr();
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

py::object frozen_step(const py::dict& config) {
  auto step = std::make_unique<FrozenStep>(config);
  const py::capsule self(step.get(), kFrozenStep, [](PyObject* capsule) {
    delete static_cast<FrozenStep*>(PyCapsule_GetPointer(capsule, kFrozenStep));
  });
  step.release();
  return checked(PyCFunction_New(&step_method, self.ptr()));
}

}  // namespace

void register_frozen_step(py::module_& m) {
  m.def("frozen_step", &frozen_step, py::arg("config"), "The step of a cell whose weights are packed once.");
}

}  // namespace rmc
