// Cycles spent per phase, for `rmc bench profile`: off unless asked for, and then a time stamp per phase and step.
#pragma once
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <x86intrin.h>
#endif

namespace rmc {

enum class Phase {
  kPack, kLoad, kInput, kQkv, kQkvNorm, kAttention, kOutput, kNorm, kMlp, kGateProduct, kGates,
  kBackGates, kBackNorm, kBackMlp, kBackAttention, kBackQkv, kBackGateProduct, kBackInput, kWeightGradient, kReduce,
  kCount
};  // clang-format keeps one group a line: forward, backward

constexpr const char* kPhaseNames[] = {
    "pack", "load", "input", "qkv", "qkv_norm", "attention", "output", "norm", "mlp", "gate_product", "gates",
    "back_gates", "back_norm", "back_mlp", "back_attention", "back_qkv", "back_gate_product", "back_input",
    "weight_gradient", "reduce"};

struct Profile {
  std::atomic<bool> enabled{false};
  std::atomic<uint64_t> cycles[static_cast<int>(Phase::kCount)];
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
    profile().cycles[static_cast<int>(phase)].fetch_add(time - last_, std::memory_order_relaxed);
    last_ = time;
  }

 private:
  static uint64_t now() {
#if defined(__x86_64__)
    return __rdtsc();
#else
    return 0;
#endif
  }
  bool enabled_;
  uint64_t last_ = 0;
};

}  // namespace rmc
