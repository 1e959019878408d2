#include "common/interrupt.h"

#include <atomic>
#include <chrono>

namespace rmc {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kPause{100};
std::atomic<InterruptQuestion> asked{nullptr};

}  // namespace

void set_interrupt_question(InterruptQuestion question) { asked.store(question, std::memory_order_relaxed); }

void ask_for_interrupt() {
  thread_local Clock::time_point next{};
  const InterruptQuestion question = asked.load(std::memory_order_relaxed);
  if (!question) return;
  const Clock::time_point now = Clock::now();
  if (now < next) return;
  if (question()) throw Interrupted();
  next = Clock::now() + kPause;
}

}  // namespace rmc
