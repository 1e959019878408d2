#include "python/without_gil.h"

#include <pthread.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/syscall.h>
#endif

#include <cstdlib>
#include <exception>

namespace rmc {
namespace {

[[noreturn]] void block() {
  for (;;) pause();
}

std::terminate_handler before = nullptr;

bool is_main_thread() {
#ifdef __linux__
  return syscall(SYS_gettid) == getpid();
#else
  return pthread_main_np() != 0;
#endif
}

bool interpreter_exits() {
#if PY_VERSION_HEX >= 0x030d0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Between two kernels a call is in functions of torch, which take the GIL back in destructors as well.
[[noreturn]] void terminate() {
  if (!std::current_exception() && !is_main_thread() && interpreter_exits()) block();
  if (before) before();
  std::abort();
}

}  // namespace

void take_gil(PyThreadState* state) {
  try {
    PyEval_RestoreThread(state);
  } catch (...) {  // nothing else is thrown by C; to leave this handler would abort
    block();
  }
}

void block_threads_at_exit() { before = std::set_terminate(terminate); }

}  // namespace rmc
