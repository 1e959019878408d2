// What tests and `rmc bench` ask of the kernels, and no call of a cell.
#include <pybind11/pybind11.h>

#include <string>

#include "cell/hooks.h"
#include "common/parallel.h"
#include "common/profile.h"
#include "python/bindings.h"
#include "python/native.h"
#include "python/without_gil.h"

namespace rmc {
namespace {

py::dict read_profile() {
  py::dict out;
  for (int i = 0; i < static_cast<int>(Phase::kCount); i++) out[kPhaseNames[i]] = profile().nanoseconds[i].exchange(0);
  return out;
}

}  // namespace

void register_hooks(py::module_& m) {
  m.def("parallel_regions", &parallel_regions, "How many parallel regions were entered so far.");
  m.def("profile_enable", [](bool on) { profile().enabled = on; }, "Turns the phase timers on or off.");
  m.def("time_calls", [](bool on) { profile().timed = on; }, "Turns the clock of `call_nanoseconds` on or off.");
  m.def(
      "call_nanoseconds", [] { return profile().call_nanoseconds.exchange(0); },
      "Wall time of the calls since it was last asked for, kernels and packing.");
  m.def("profile", &read_profile, "Nanoseconds of CPU time per phase since the last call, over all threads.");
  m.def(
      "vector_math",
      [](const std::string& isa, int function, Address x, Address y, int64_t count) {
        hooks(parse_isa(isa)).apply(function, pointer<void>(x), pointer<void>(y), count);
      },
      "exp (0), sigmoid (1), tanh (2) of float32.");
  m.def(
      "time_gemm",
      [](const std::string& isa, int64_t rows, int64_t inputs, int64_t outputs, int64_t repeats) {
        const WithoutGil unlocked;
        return hooks(parse_isa(isa)).gemm(rows, inputs, outputs, repeats);
      },
      "Least CPU seconds of one float32 product of the cell's GEMM.");
}

}  // namespace rmc
