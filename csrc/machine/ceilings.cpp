#include "machine/ceilings.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <new>
#include <stdexcept>

#include "machine/loops.h"

namespace rmc {
namespace {

constexpr int kWindows = 10;

struct Loops {
  double (*fma)(int64_t iterations);
  float (*read)(const float* data, int64_t count);
};

Loops loops_for([[maybe_unused]] Isa isa) {
#ifdef RMC_HAVE_AVX512
  if (isa >= Isa::kAvx512) return {fma_loop_avx512, read_loop_avx512};
#endif
#ifdef RMC_HAVE_AVX2
  if (isa == Isa::kAvx2) return {fma_loop_avx2, read_loop_avx2};
#endif
  return {fma_loop_generic, read_loop_generic};
}

double thread_cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

void check_time(double seconds) {
  if (!(seconds > 0 && seconds <= 60)) throw std::invalid_argument("seconds: takes a number above 0, at most 60");
}

// The most work per second over the windows; `work()` returns how much one call did.
template <class Work>
double best_rate(double seconds, Work work) {
  check_time(seconds);
  double best = 0;
  for (int window = 0; window < kWindows; window++) {
    const double start = thread_cpu_seconds();
    double done = 0, elapsed = 0;
    do {
      done += work();
      elapsed = thread_cpu_seconds() - start;
    } while (elapsed < seconds / kWindows);
    best = std::max(best, done / elapsed);
  }
  return best;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

double peak_fma(double seconds, Isa isa) {
  const Loops loops = loops_for(isa);
  return 1e-9 * best_rate(seconds, [&] { return loops.fma(4000); });
}

double peak_amx(double seconds) {
  check_time(seconds);
#ifdef RMC_HAVE_AMX
  if (supported(Isa::kAmx)) {
    return 1e-9 * best_rate(seconds, [] { return tile_loop_amx(500); });
  }
#endif
  return 0;
}

double bandwidth(int64_t bytes, double seconds) {
  if (bytes < 4096) throw std::invalid_argument("bytes: takes at least 4096");
  bytes = bytes / 1024 * 1024;
  const std::unique_ptr<float, Free> buffer(static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(bytes))));
  if (!buffer) throw std::bad_alloc();
  const int64_t count = bytes / static_cast<int64_t>(sizeof(float));
  std::fill_n(buffer.get(), count, 1.0f);

  const Loops loops = loops_for(supported_isas().back());
  // Small buffers are read several times between two looks at the clock, whose cost would show.
  const int64_t passes = std::max<int64_t>(1, (int64_t{1} << 20) / bytes);
  volatile float sink = 0;
  return 1e-9 * best_rate(seconds, [&] {
           for (int64_t pass = 0; pass < passes; pass++) sink = loops.read(buffer.get(), count);
           return static_cast<double>(passes * bytes);
         });
}

}  // namespace rmc
