// The one place where threads are started.
#pragma once
#include <cstdint>

namespace rmc {

using Task = void (*)(void* context, int64_t index);

// Runs task(context, i) for i in [0, tasks) on at most `threads` threads; the first exception is rethrown here once all
// have ended. Serial with one task or thread, and in a forked child, whose copy of the thread pool has no threads.
void parallel_for(int64_t tasks, int threads, Task task, void* context);

// The same for a callable; `function` outlives the call.
template <class Function>
void parallel_for(int64_t tasks, int threads, Function&& function) {
  auto* target = &function;
  parallel_for(
      tasks, threads, [](void* context, int64_t index) { (*static_cast<decltype(target)>(context))(index); },
      static_cast<void*>(target));
}

// How many calls so far went parallel (for tests).
int64_t parallel_regions();

}  // namespace rmc
