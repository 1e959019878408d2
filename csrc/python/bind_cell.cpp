// The cell in Python: pointers as integers (Tensor.data_ptr()), sizes as integers. rmc_kernels/backends/cpu.py is the
// only caller and has checked shapes, dtypes and layout.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "common/interrupt.h"
#include "python/bindings.h"
#include "python/native.h"
#include "python/without_gil.h"

namespace rmc {
namespace {

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

// Whether a signal's handler raised; only Python's main thread runs handlers.
bool signal_raised() {
  return WithoutGil::with_gil([] { return PyErr_CheckSignals() != 0; });
}

}  // namespace

void register_cell(py::module_& m) {
  set_interrupt_question(signal_raised);
  py::class_<PackedWeights>(m, "PackedWeights", "Parameters in the layout of the kernels.");
  py::class_<Cell, std::shared_ptr<Cell>>(m, "Cell", "One cell, planned for an instruction set.")
      .def(py::init([](const py::dict& spec, const std::string& precision, const std::string& isa) {
             return std::make_shared<Cell>(config_of(spec), parse_isa(isa), precision_of(precision));
           }),
           py::arg("spec"), py::arg("precision"), py::arg("isa"))
      .def_property_readonly("isa", &Cell::isa)
      .def_property_readonly("activation_bytes", &Cell::activation_bytes)
      .def("pack", &Cell::pack)
      .def("forward", &Cell::forward)
      .def("backward", &Cell::backward);
}

}  // namespace rmc
