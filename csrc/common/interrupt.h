// Lets a long call be abandoned, by Ctrl-C say.
#pragma once
#include <exception>

namespace rmc {

// Thrown out of a call that was abandoned; what it has written so far is worth nothing.
class Interrupted : public std::exception {
 public:
  const char* what() const noexcept override { return "interrupted"; }
};

// Asked by threads that called into this library, at most ten times a second each: whether to abandon the call.
using InterruptQuestion = bool (*)();
void set_interrupt_question(InterruptQuestion question);

// Throws Interrupted if the question is answered with yes. Called once a time step: 20 ns.
void ask_for_interrupt();

}  // namespace rmc
