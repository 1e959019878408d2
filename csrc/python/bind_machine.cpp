#include <pybind11/stl.h>

#include "machine/ceilings.h"
#include "machine/features.h"
#include "machine/isa.h"
#include "python/bindings.h"
#include "python/without_gil.h"

namespace py = pybind11;

namespace rmc {
namespace {

py::dict features() {
  py::dict out;
  for (const auto& [name, present] : cpu_features().items()) out[name] = present;
  return out;
}

std::vector<std::string> isas() {
  std::vector<std::string> out;
  for (Isa isa : supported_isas()) out.emplace_back(name(isa));
  return out;
}

double peak_fma_named(double seconds, const std::string& isa) {
  return peak_fma(seconds, isa.empty() ? supported_isas().back() : parse_isa(isa));
}

}  // namespace

void register_machine(py::module_& module) {
  const py::call_guard<WithoutGil> unlocked;
  module.def("cpu_features", &features);
  module.def("isas", &isas);
  module.def("peak_fma", &peak_fma_named, py::arg("seconds") = 0.2, py::arg("isa") = "", unlocked);
  module.def("peak_amx", &peak_amx, py::arg("seconds") = 0.2, unlocked);
  module.def("bandwidth", &bandwidth, py::arg("bytes"), py::arg("seconds") = 0.2, unlocked);
}

}  // namespace rmc
