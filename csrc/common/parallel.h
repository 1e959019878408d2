// The one place where threads are started.
#pragma once
#include <cstdint>

namespace rmc {

using Task = void (*)(void* context, int64_t index);

// Runs task(context, i) for i in [0, tasks) on at most `threads` threads, the caller among them; the first exception is
// rethrown here once all have ended. The others sleep between calls, and a call waits only for those that took a task:
// where the other cores are busy, the caller does all tasks itself. Serial with one task or thread, and in a forked
// child, whose copy of the pool has no threads.
void parallel_for(int64_t tasks, int threads, Task task, void* context);

// The same for a callable; `function` outlives the call.
template <class Function>
void parallel_for(int64_t tasks, int threads, Function&& function) {
  auto* target = &function;
  parallel_for(
      tasks, threads, [](void* context, int64_t index) { (*static_cast<decltype(target)>(context))(index); },
      static_cast<void*>(target));
}

// For long tasks, once a time step: throws where the call is to be abandoned, as another of its tasks failed or as
// ask_for_interrupt() says.
void check_abandoned();

// How many calls so far went parallel (for tests).
int64_t parallel_regions();

}  // namespace rmc
