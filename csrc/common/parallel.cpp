#include "common/parallel.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "common/interrupt.h"

namespace rmc {
namespace {

std::atomic<int64_t> regions{0};
std::atomic<bool> forked{false};

void mark_forked() { forked.store(true, std::memory_order_relaxed); }
const int registered = pthread_atfork(nullptr, nullptr, mark_forked);

// One parallel call.
struct Region {
  const Task task;
  void* const context;
  const int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  std::atomic<int> inside{0};  // threads of the pool at work; written under the pool's lock
  int seats = 0;               // threads that may still join; under the pool's lock
  std::condition_variable left;

  Region(Task task, void* context, int64_t tasks) : task(task), context(context), tasks(tasks) {}

  void work() noexcept;
};

// How long threads stay awake after a call, and a call for its last tasks, before they sleep. Asleep, a thread may lie
// on a core that is taken, or its virtual core be given away: with two threads and calls of 33 ms one after the other,
// sleeping at once cost 5 to 25 ms a call, 0.1 ms up to 20, 0.5 ms none.
constexpr std::chrono::microseconds kLinger{500};
using Clock = std::chrono::steady_clock;

thread_local Region* current = nullptr;
thread_local bool pooled = false;  // whether this thread is one of the pool's

void Region::work() noexcept {
  Region* const outer = current;
  current = this;
  for (int64_t i = next++; i < tasks && !failed.load(std::memory_order_relaxed); i = next++) {
    try {
      task(context, i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
  current = outer;
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits awake for at most kLinger; whether the condition holds.
template <class Condition>
bool linger(Condition&& condition) {
  const Clock::time_point end = Clock::now() + kLinger;
  while (!condition()) {
    for (int i = 0; i < 16; i++) pause();
    if (Clock::now() > end) return false;
  }
  return true;
}

class Pool {
 public:
  void run(Region& region, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      grow(helpers);
      helpers = region.seats = std::min(helpers, size_);
      if (helpers > 0) open_.push_back(&region);
    }
    posted_++;
    for (int i = 0; i < helpers; i++) wake_.notify_one();
    calls_++;
    region.work();
    linger([&] { return region.inside.load() == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    calls_--;
    close(region);
    region.left.wait(lock, [&] { return region.inside == 0; });
  }

 private:
  // As many threads as the system grants.
  void grow(int wanted) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the program's own threads
    try {
      for (; size_ < wanted; size_++) std::thread([this] { serve(); }).detach();
    } catch (...) {
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  void close(Region& region) {
    const auto found = std::find(open_.begin(), open_.end(), &region);
    if (found != open_.end()) open_.erase(found);
  }

  [[noreturn]] void serve() {
    pooled = true;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (open_.empty()) {
        const int64_t seen = posted_.load();
        lock.unlock();
        while (!linger([&] { return posted_.load() != seen; }) && calls_.load() > 0) {
        }
        lock.lock();
      }
      wake_.wait(lock, [&] { return !open_.empty(); });
      Region& region = *open_.front();
      region.inside++;
      if (--region.seats == 0) open_.pop_front();
      lock.unlock();
      region.work();
      lock.lock();
      if (--region.inside == 0) region.left.notify_one();
    }
  }

  std::atomic<int64_t> posted_{0};  // calls so far
  std::atomic<int> calls_{0};       // calls running now
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Region*> open_;
  int size_ = 0;
};

Pool& pool() {
  static Pool& shared = *new Pool;  // never destroyed: its threads sleep in it until the process ends
  return shared;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, Task task, void* context) {
  if (tasks < threads) threads = static_cast<int>(tasks);
  if (threads <= 1 || registered != 0 || forked.load(std::memory_order_relaxed)) {
    for (int64_t i = 0; i < tasks; i++) task(context, i);
    return;
  }
  regions.fetch_add(1, std::memory_order_relaxed);
  Region region(task, context, tasks);
  pool().run(region, threads - 1);
  if (region.error) std::rethrow_exception(region.error);
}

void check_abandoned() {
  if (current && current->failed.load(std::memory_order_relaxed)) throw Interrupted();
  if (pooled) return;
  // A call that a signal's handler makes is no part of this region.
  struct Outside {
    Region* const region = std::exchange(current, nullptr);
    ~Outside() { current = region; }
  } outside;
  ask_for_interrupt();
}

int64_t parallel_regions() { return regions.load(std::memory_order_relaxed); }

}  // namespace rmc
