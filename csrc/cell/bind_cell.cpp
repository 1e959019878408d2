// The cell in Python: pointers as integers (Tensor.data_ptr()), sizes as integers. rmc_kernels/backends/cpu.py is the
// only caller and has checked shapes, dtypes and layout.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings.h"
#include "cell/kernels.h"
#include "cell/plan.h"
#include "common/parallel.h"
#include "common/profile.h"

namespace rmc {
namespace {

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

Gate gate_of(const std::string& style) {
  if (style == "unit") return Gate::kUnit;
  if (style == "memory") return Gate::kMemory;
  if (style.empty()) return Gate::kNone;
  throw std::invalid_argument("gate_style: got '" + style + "'");
}

CellConfig config_of(const py::dict& d) {
  CellConfig c;
  auto size = [&](const char* name) { return d[name].cast<int64_t>(); };
  auto flag = [&](const char* name) { return d[name].cast<bool>(); };
  c.input_size = size("input_size"), c.slots = size("mem_slots"), c.head_size = size("head_size");
  c.key_size = size("key_size"), c.heads = size("num_heads"), c.rows = size("rows");
  c.blocks = size("num_blocks"), c.mlp_layers = size("attention_mlp_layers");
  c.gate = gate_of(d["gate_style"].cast<std::string>());
  c.input_projection = flag("has_input_projection"), c.qkv_norm = flag("has_qkv_norm");
  c.attention_norm = flag("has_attention_norm"), c.mlp_norm = flag("has_mlp_norm");
  c.joint_norm = flag("joint_norm"), c.output_projection = flag("has_output_projection");
  c.attention_residual = flag("has_attention_residual"), c.relu_last = flag("mlp_ends_in_relu");
  c.tied = flag("tied"), c.trains_gate_biases = flag("trains_gate_biases");
  c.forget_bias = d["forget_bias"].cast<double>(), c.input_bias = d["input_bias"].cast<double>();
  return c;
}

Precision precision_of(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "bfloat16") return Precision::kBfloat16;
  if (name == "float64") return Precision::kFloat64;
  throw std::invalid_argument("precision: got '" + name + "'");
}

// Bytes of a number outside of products.
int64_t itemsize(const Plan& plan) { return plan.precision == Precision::kFloat64 ? 8 : 4; }

class PackedWeights {
 public:
  PackedWeights(std::shared_ptr<const Plan> plan, const std::vector<Address>& params, bool backward)
      : plan_(std::move(plan)), backward_(backward) {
    const int64_t count = backward ? plan_->all_weights : plan_->forward_weights;
    const size_t bytes = (static_cast<size_t>(count * itemsize(*plan_)) + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, bytes);
    if (!data_) throw std::bad_alloc();
    kernels(plan_->isa, plan_->precision)
        .pack(*plan_, reinterpret_cast<const void* const*>(params.data()), backward, data_);
  }
  ~PackedWeights() { std::free(data_); }
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  // Null where they cannot serve: the caller then packs.
  const void* data_for(const Plan& plan, bool backward) const {
    if (&plan != plan_.get()) throw std::invalid_argument("packed: these weights belong to another cell");
    return backward && !backward_ ? nullptr : data_;
  }

 private:
  std::shared_ptr<const Plan> plan_;
  bool backward_;
  void* data_ = nullptr;
};

// One cell, planned.
class Cell {
 public:
  Cell(const py::dict& spec, const std::string& precision, const std::string& isa)
      : plan_(make_plan(config_of(spec), parse_isa(isa), precision_of(precision))),
        kernels_(kernels(plan_->isa, plan_->precision)),
        activations_(kernels_.activation_size(*plan_)) {}

  const char* isa() const { return name(plan_->isa); }
  // Bytes of saved activations: steps * (batch * first + second).
  py::tuple activation_bytes() const {
    return py::make_tuple(activations_.per_element * itemsize(*plan_), activations_.per_tile * itemsize(*plan_));
  }

  std::unique_ptr<PackedWeights> pack(const std::vector<Address>& params, bool backward) const {
    check(params);
    py::gil_scoped_release release;
    return std::make_unique<PackedWeights>(plan_, params, backward);
  }

  void forward(const py::tuple& sizes, const py::tuple& pointers, const py::tuple& params, const PackedWeights* packed,
               Address memories, Address activations, int64_t activation_bytes) const {
    Arguments a(*this, sizes, pointers, params, packed, false);
    a.in.memories = pointer<void>(memories);
    a.activations(*this, activations, activation_bytes);
    py::gil_scoped_release release;
    kernels_.forward(*plan_, a.in);
  }

  // grads: gradient of the memories; then where to write those of x, memory, reset memory (0: not wanted).
  void backward(const py::tuple& sizes, const py::tuple& pointers, const py::tuple& params, const PackedWeights* packed,
                Address memories, Address activations, int64_t activation_bytes, const py::tuple& grads,
                const py::tuple& param_grads) const {
    Arguments a(*this, sizes, pointers, params, packed, true);
    a.in.memories = pointer<void>(memories);
    if (activation_bytes) a.activations(*this, activations, activation_bytes);
    const std::vector<void*> wanted = addresses<void>(param_grads);
    check(wanted);
    CellGradients out;
    out.memories = pointer<void>(grads[0].cast<Address>());
    out.x = pointer<void>(grads[1].cast<Address>());
    out.memory = pointer<void>(grads[2].cast<Address>());
    out.reset_memory = pointer<void>(grads[3].cast<Address>());
    for (void* p : wanted) {
      if (p) out.params = wanted.data();
    }
    py::gil_scoped_release release;
    kernels_.backward(*plan_, a.in, out);
  }

 private:
  struct Arguments {
    CellInputs in;
    std::vector<const void*> params;

    Arguments(const Cell& cell, const py::tuple& sizes, const py::tuple& pointers, const py::tuple& list,
              const PackedWeights* packed, bool backward) {
      in.batch = sizes[0].cast<int64_t>();
      in.steps = sizes[1].cast<int64_t>();
      in.threads = sizes[2].cast<int>();
      if (in.batch < 0 || in.steps < 0) throw std::invalid_argument("sizes: negative");
      in.x = pointer<void>(pointers[0].cast<Address>());
      in.memory = pointer<void>(pointers[1].cast<Address>());
      in.lengths = pointer<int64_t>(pointers[2].cast<Address>());
      in.resets = pointer<bool>(pointers[3].cast<Address>());
      in.reset_memory = pointer<void>(pointers[4].cast<Address>());
      in.dropout_mask = pointer<void>(pointers[5].cast<Address>());
      if (in.resets && !in.reset_memory && in.batch) throw std::invalid_argument("reset_memory: missing");
      params = addresses<const void>(list);
      cell.check(params);
      in.params = params.data();
      in.packed = packed ? packed->data_for(*cell.plan_, backward) : nullptr;
    }
    void activations(const Cell& cell, Address address, int64_t bytes) {
      const ActivationSize& size = cell.activations_;
      if (!address) return;
      if (bytes < in.steps * (in.batch * size.per_element + size.per_tile) * itemsize(*cell.plan_))
        throw std::invalid_argument("activations: the buffer is too small");
      in.activations = pointer<void>(address);
    }
  };

  template <class T>
  static std::vector<T*> addresses(const py::tuple& list) {
    std::vector<T*> out;
    out.reserve(list.size());
    for (py::handle item : list) out.push_back(pointer<T>(item.cast<Address>()));
    return out;
  }
  template <class T>
  void check(const std::vector<T>& params) const {
    if (static_cast<int64_t>(params.size()) != plan_->params)
      throw std::invalid_argument("params: takes " + std::to_string(plan_->params) + ", got " +
                                  std::to_string(params.size()));
  }

  std::shared_ptr<const Plan> plan_;
  const Kernels& kernels_;
  ActivationSize activations_;
};

py::dict read_profile() {
  py::dict out;
  for (int i = 0; i < static_cast<int>(Phase::kCount); i++) out[kPhaseNames[i]] = profile().nanoseconds[i].exchange(0);
  return out;
}

}  // namespace

void register_cell(py::module_& m) {
  py::class_<PackedWeights>(m, "PackedWeights", "Parameters in the layout of the kernels.");
  py::class_<Cell>(m, "Cell", "One cell, planned for an instruction set.")
      .def(py::init<const py::dict&, const std::string&, const std::string&>(), py::arg("spec"), py::arg("precision"),
           py::arg("isa"))
      .def_property_readonly("isa", &Cell::isa)
      .def_property_readonly("activation_bytes", &Cell::activation_bytes)
      .def("pack", &Cell::pack)
      .def("forward", &Cell::forward)
      .def("backward", &Cell::backward);
  m.def("parallel_regions", &parallel_regions, "How many parallel regions were entered so far.");
  m.def("profile_enable", [](bool on) { profile().enabled = on; }, "Turns the phase timers on or off.");
  m.def("profile", &read_profile, "Nanoseconds of CPU time per phase since the last call, over all threads.");
  m.def(
      "vector_math",
      [](const std::string& isa, int function, Address x, Address y, int64_t count) {
        kernels(parse_isa(isa), Precision::kFloat32).apply(function, pointer<void>(x), pointer<void>(y), count);
      },
      "exp (0), sigmoid (1), tanh (2) of float32, for tests.");
  m.def(
      "time_gemm",
      [](const std::string& isa, int64_t rows, int64_t inputs, int64_t outputs, int64_t repeats) {
        py::gil_scoped_release release;
        return kernels(parse_isa(isa), Precision::kFloat32).gemm(rows, inputs, outputs, repeats);
      },
      "Least CPU seconds of one float32 product of the cell's GEMM.");
}

}  // namespace rmc
