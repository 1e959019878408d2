#include "machine/loops.h"
#include "machine/vector_loops.h"

namespace rmc {

double fma_loop_generic(int64_t iterations) { return fma_loop<16>(iterations); }

float read_loop_generic(const float* data, int64_t count) { return read_loop<16>(data, count); }

}  // namespace rmc
