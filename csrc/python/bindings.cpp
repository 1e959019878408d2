#include "python/bindings.h"

#include "python/without_gil.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ part of rmc_kernels: kernels for the CPU, and what the CPU itself can do.";
  rmc::block_threads_at_exit();
  rmc::register_machine(module);
  rmc::register_cell(module);
  rmc::register_tensor_cell(module);
  rmc::register_frozen_step(module);
  rmc::register_hooks(module);
}
