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
  std::atomic<bool> steps{false};
  std::atomic<int64_t> step_nanoseconds{0};
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

// Wall time of the kernel in the latest step of a bound cell, for `rmc bench uses`: what a step takes besides, where
// the noise of its kernel is larger than that.
class StepClock {
 public:
  StepClock() : enabled_(profile().steps.load(std::memory_order_relaxed)) {
    if (enabled_) start_ = std::chrono::steady_clock::now();
  }
  ~StepClock() {
    if (enabled_) profile().step_nanoseconds = (std::chrono::steady_clock::now() - start_).count();
  }

 private:
  bool enabled_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace rmc
