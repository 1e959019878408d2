// Letting other threads run Python during a call, and taking the GIL back.
//
// Before 3.14, CPython ends a thread that asks for the GIL while the interpreter exits, by pthread_exit. That unwinds
// through C++ destructors, which may not throw, and the process aborts. Here such a thread blocks for ever instead, as
// it does from 3.14 on, and the process exits around it. Asking first whether the interpreter exits would be a race.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>

namespace rmc {

// As PyEval_RestoreThread.
void take_gil(PyThreadState* state);

// Makes a thread that is ended so inside a function of torch block as well, where it would abort the process. Once.
void block_threads_at_exit();

// The thread has no GIL while this lives.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()), outer_(std::exchange(innermost(), this)) {}
  ~WithoutGil() {
    innermost() = outer_;
    take_gil(state_);
  }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

  // Runs `function` with the GIL, on a thread that gave it up here.
  template <class Function>
  static auto with_gil(Function&& function) {
    struct Held {
      explicit Held(PyThreadState* state) { take_gil(state); }
      ~Held() { PyEval_SaveThread(); }
    };
    const Held held(innermost()->state_);
    return function();
  }

 private:
  static WithoutGil*& innermost() {
    thread_local WithoutGil* innermost = nullptr;
    return innermost;
  }

  PyThreadState* const state_;
  WithoutGil* const outer_;
};

}  // namespace rmc
