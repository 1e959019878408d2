#include "common/parallel.h"

#include <pthread.h>

#include <atomic>
#include <exception>

#ifdef RMC_THREADS_STD
#include <thread>
#include <vector>
#endif

namespace rmc {
namespace {

std::atomic<int64_t> regions{0};
std::atomic<bool> forked{false};

void mark_forked() { forked.store(true, std::memory_order_relaxed); }
const int registered = pthread_atfork(nullptr, nullptr, mark_forked);

struct Region {
  Task task;
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void run(int64_t index) noexcept {
    if (failed.load(std::memory_order_relaxed)) return;
    try {
      task(context, index);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
};

void run_threads(Region& region, int64_t tasks, int threads) {
#ifdef RMC_THREADS_STD
  // Sanitizers do not see the synchronisation inside GCC's OpenMP runtime.
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i = next++; i < tasks; i = next++) region.run(i);
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; i++) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
#else
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < tasks; i++) region.run(i);
#endif
}

}  // namespace

void parallel_for(int64_t tasks, int threads, Task task, void* context) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1 || registered != 0 || forked.load(std::memory_order_relaxed)) {
    for (int64_t i = 0; i < tasks; i++) task(context, i);
    return;
  }
  regions.fetch_add(1, std::memory_order_relaxed);
  Region region{task, context, {}, nullptr};
  run_threads(region, tasks, threads);
  if (region.error) std::rethrow_exception(region.error);
}

int64_t parallel_regions() { return regions.load(std::memory_order_relaxed); }

}  // namespace rmc
