// What each part of csrc/ adds to the Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace rmc {

void register_machine(pybind11::module_& module);
void register_cell(pybind11::module_& module);
void register_tensor_cell(pybind11::module_& module);
void register_frozen_step(pybind11::module_& module);
void register_hooks(pybind11::module_& module);

}  // namespace rmc
