// What the sanitizers should see of csrc/machine: every loop that this CPU can execute, at edges of its arguments.
#include <cmath>
#include <cstdio>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "machine/ceilings.h"
#include "machine/features.h"
#include "machine/isa.h"
#include "tests/check.h"

namespace {

template <class Call>
void check_refused(Call call, const std::string& argument) {
  try {
    call();
    check(false, argument + " out of range is refused");
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).rfind(argument + ":", 0) == 0, "the message names " + argument);
  }
}

void test_instruction_sets() {
  const std::vector<rmc::Isa> isas = rmc::supported_isas();
  check(!isas.empty() && isas.front() == rmc::Isa::kGeneric, "generic code runs anywhere");
  for (rmc::Isa isa : isas) check(rmc::parse_isa(rmc::name(isa)) == isa, std::string(rmc::name(isa)) + " is parsed");
  check_refused([] { rmc::parse_isa("mmx"); }, "isa");
}

void test_ceilings() {
  for (rmc::Isa isa : rmc::supported_isas()) {
    check(rmc::peak_fma(0.01, isa) > 0, std::string("peak_fma of ") + rmc::name(isa));
  }
  check((rmc::peak_amx(0.01) > 0) == rmc::supported(rmc::Isa::kAmx), "peak_amx is positive exactly with AMX");
  for (int64_t bytes : {4096, 5000, 1 << 20}) check(rmc::bandwidth(bytes, 0.01) > 0, "bandwidth");
}

void test_arguments() {
  check_refused([] { rmc::peak_fma(0, rmc::Isa::kGeneric); }, "seconds");
  check_refused([] { rmc::peak_fma(std::numeric_limits<double>::quiet_NaN(), rmc::Isa::kGeneric); }, "seconds");
  check_refused([] { rmc::bandwidth(4095, 0.01); }, "bytes");
}

void test_threads() {
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; i++) threads.emplace_back([] { rmc::bandwidth(4096, 0.01); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  test_threads();  // first: they race for the one-time detection
  test_instruction_sets();
  test_ceilings();
  test_arguments();
  std::printf("%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}
