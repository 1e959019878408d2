// A cell that takes tensors of torch: one call reads and checks all of them, makes the results and runs. What it does
// not read (another dtype, device or class, strides, no memory) it leaves to the caller, who converts or explains.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>
#include <vector>

#include "python/bindings.h"
#include "python/native.h"
#include "python/tensors.h"

namespace rmc {
namespace {

// The places of tensors in rmc_kernels.backends.protocol.Call.flat(); the parameters come last.
enum Place { kLengths, kResets, kDropoutMask, kX, kMemory, kResetMemory, kParams };

using Sizes = std::vector<int64_t>;

Sizes sizes_of(py::handle tuple) {
  Sizes sizes;
  for (py::handle size : tuple) sizes.push_back(size.cast<int64_t>());
  return sizes;
}

class TensorCell {
 public:
  // shapes: of the parameters, in their order.
  TensorCell(const Tensors& tensors, py::object cell, const py::tuple& shapes)
      : tensors_(tensors), owner_(std::move(cell)), cell_(owner_.cast<const Cell*>()) {
    for (py::handle shape : shapes) shapes_.push_back(sizes_of(shape));
    if (static_cast<int64_t>(shapes_.size()) != plan().params) throw std::invalid_argument("shapes: of another cell");
    dtype_ = plan().precision == Precision::kFloat64 ? kDlFloat64 : kDlFloat32;
  }

  // The memories [B, T, N, D] and the last of them (not written where T = 0), or None.
  py::object forward(const py::tuple& call, int threads, const PackedWeights* packed, Address activations,
                     int64_t activation_bytes) const {
    Inputs inputs;
    CellInputs& in = inputs.cell;
    if (!read(call, inputs)) return py::none();
    const NewTensor memories = tensors_.make(dtype_, {in.batch, in.steps, plan().N, plan().D});
    const NewTensor last = tensors_.make(dtype_, {in.batch, plan().N, plan().D});
    if (!memories.object || !last.object) return py::none();
    in.threads = threads, in.memories = memories.data, in.final_memory = in.steps ? last.data : nullptr;
    cell_->run(in, packed, activations, activation_bytes);
    return py::make_tuple(memories.object, last.object);
  }

  // Gradients of x, memory, reset memory and the parameters, None where they are not needed; or None for all.
  py::object backward(const py::tuple& call, int threads, const PackedWeights* packed, Address activations,
                      int64_t activation_bytes, py::handle memories, py::handle grad, const py::sequence& needs) const {
    Inputs inputs;
    CellInputs& in = inputs.cell;
    CellGradients out;
    if (!read(call, inputs)) return py::none();
    const Sizes shape = {in.batch, in.steps, plan().N, plan().D};
    const void* from = nullptr;
    if (!take(memories, dtype_, shape, from) || !take(grad, dtype_, shape, out.memories)) return py::none();
    in.threads = threads, in.memories = const_cast<void*>(from);

    const Sizes memory = {in.batch, plan().N, plan().D};
    py::list grads;
    bool made_all = true;
    const auto make = [&](const Sizes& sizes, bool present) -> void* {
      NewTensor made;
      if (present && needs[grads.size()].cast<bool>()) {
        made = tensors_.make(dtype_, sizes.data(), static_cast<int32_t>(sizes.size()));
        made_all = made_all && made.object;
      }
      grads.append(made.object ? made.object : py::none());
      return made.data;
    };
    out.x = make(inputs.x_shape, true);
    out.memory = make(memory, true);
    out.reset_memory = make(memory, !field(call, kResetMemory).is_none());
    std::vector<void*> params;
    for (const Sizes& each : shapes_) params.push_back(make(each, true));
    if (!made_all) return py::none();  // the caller then meets torch's error
    out.params = params.data();
    cell_->run_back(in, packed, activations, activation_bytes, out);
    return std::move(grads);
  }

 private:
  struct Inputs {
    CellInputs cell;
    Sizes x_shape;
    std::vector<const void*> params;
  };

  const Plan& plan() const { return cell_->plan(); }

  static py::handle field(const py::tuple& call, size_t place) {
    return PyTuple_GET_ITEM(call.ptr(), static_cast<Py_ssize_t>(place));
  }

  bool read(const py::tuple& call, Inputs& inputs) const {
    const Plan& p = plan();
    CellInputs& in = inputs.cell;
    DLTensor x;
    if (call.size() != kParams + shapes_.size()) return false;
    if (!tensors_.read(field(call, kX).ptr(), x) || x.ndim < 3 || x.ndim > 4) return false;
    in.batch = x.shape[0], in.steps = x.shape[1];
    inputs.x_shape = x.ndim == 4 ? Sizes{in.batch, in.steps, p.n, p.I} : Sizes{in.batch, in.steps, p.n * p.I};
    const Sizes memory = {in.batch, p.N, p.D}, steps = {in.batch, in.steps};
    const Sizes mask = {in.batch, in.steps, p.H, p.N, p.S};
    if (!take(field(call, kX), dtype_, inputs.x_shape, in.x) ||
        !take(field(call, kMemory), dtype_, memory, in.memory) ||
        !take_optional(field(call, kLengths), kDlInt64, {in.batch}, in.lengths) ||
        !take_optional(field(call, kResets), kDlBool, steps, in.resets) ||
        !take_optional(field(call, kResetMemory), dtype_, memory, in.reset_memory) ||
        !take_optional(field(call, kDropoutMask), dtype_, mask, in.dropout_mask))
      return false;
    if (in.resets && field(call, kResetMemory).is_none()) return false;
    inputs.params.resize(shapes_.size());
    for (size_t i = 0; i < shapes_.size(); i++) {
      if (!take(field(call, kParams + i), dtype_, shapes_[i], inputs.params[i])) return false;
    }
    in.params = inputs.params.data();
    return true;
  }

  template <class T>
  bool take(py::handle tensor, DLDataType dtype, const Sizes& shape, const T*& to) const {
    DLTensor found;
    if (!tensors_.read(tensor.ptr(), dtype, shape.data(), static_cast<int32_t>(shape.size()), found)) return false;
    to = reinterpret_cast<const T*>(found.begin());
    return true;
  }
  template <class T>
  bool take_optional(py::handle tensor, DLDataType dtype, const Sizes& shape, const T*& to) const {
    return tensor.is_none() || take(tensor, dtype, shape, to);
  }

  Tensors tensors_;
  py::object owner_;
  const Cell* cell_;
  std::vector<Sizes> shapes_;
  DLDataType dtype_{};
};

}  // namespace

void register_tensor_cell(py::module_& m) {
  py::class_<Tensors>(m, "Tensors", "Reads and makes tensors of torch through its table of C functions.")
      .def(py::init<const py::capsule&, py::tuple, const py::object&>(), py::arg("api"), py::arg("types"),
           py::arg("is_neg"))
      .def("all_float32", &Tensors::all_float32, py::arg("tensors"), py::arg("shapes"),
           "Whether the tensors are plain float32 memory of the CPU, each of its shape in the dictionary.");
  py::class_<TensorCell>(m, "TensorCell", "A cell that takes tensors.")
      .def(py::init<const Tensors&, py::object, const py::tuple&>(), py::arg("tensors"), py::arg("cell"),
           py::arg("shapes"))
      .def("forward", &TensorCell::forward)
      .def("backward", &TensorCell::backward);
}

}  // namespace rmc
