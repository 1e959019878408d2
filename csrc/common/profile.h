// CPU time per phase, for `rmc bench profile`: off unless asked for. Reading the clock costs a third of a microsecond
// per phase and step; time stamps would be cheaper, but on a shared machine they count other processes.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>

namespace rmc {

enum class Phase {
  kPack,
  kLoad,
  kInput,
  kQkv,
  kQkvNorm,
  kAttention,
  kOutput,
  kNorm,
  kMlp,
  kGateProduct,
  kGates,
  kBackGates,
  kBackNorm,
  kBackMlp,
  kBackAttention,
  kBackQkv,
  kBackGateProduct,
  kBackInput,
  kWeightGradient,
  kReduce,
  kCount
};

constexpr const char* kPhaseNames[] = {"pack",
                                       "load",
                                       "input",
                                       "qkv",
                                       "qkv_norm",
                                       "attention",
                                       "output",
                                       "norm",
                                       "mlp",
                                       "gate_product",
                                       "gates",
                                       "back_gates",
                                       "back_norm",
                                       "back_mlp",
                                       "back_attention",
                                       "back_qkv",
                                       "back_gate_product",
                                       "back_input",
                                       "weight_gradient",
                                       "reduce"};

struct Profile {
  std::atomic<bool> enabled{false};
  std::atomic<uint64_t> nanoseconds[static_cast<int>(Phase::kCount)];
  std::atomic<bool> timed{false};
  std::atomic<int64_t> call_nanoseconds{0};
};
Profile& profile();

// Adds what passed since the last call to a phase; one per task.
class PhaseClock {
 public:
  PhaseClock() : enabled_(profile().enabled.load(std::memory_order_relaxed)) { start(); }
  void start() {
    if (enabled_) last_ = now();
  }
  void end(Phase phase) {
    if (!enabled_) return;
    const uint64_t time = now();
    profile().nanoseconds[static_cast<int>(phase)].fetch_add(time - last_, std::memory_order_relaxed);
    last_ = time;
  }

 private:
  static uint64_t now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<uint64_t>(t.tv_sec) * 1000000000u + static_cast<uint64_t>(t.tv_nsec);
  }
  bool enabled_;
  uint64_t last_ = 0;
};

// Adds the wall time of a call, kernel and packing, to `call_nanoseconds`: what a program pays besides is then the
// rest, also where the noise of the kernel is larger than that.
class CallClock {
 public:
  CallClock() : timed_(profile().timed.load(std::memory_order_relaxed)) {
    if (timed_) start_ = std::chrono::steady_clock::now();
  }
  ~CallClock() {
    if (timed_) profile().call_nanoseconds += (std::chrono::steady_clock::now() - start_).count();
  }

 private:
  bool timed_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace rmc
