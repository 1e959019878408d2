// A check that prints what failed and lets the test go on; main returns whether `failures` is 0.
#pragma once
#include <cstdio>
#include <string>

namespace {

int failures = 0;

void check(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what.c_str());
  failures++;
}

}  // namespace
