#include "machine/loops.h"
#include "machine/vector_loops.h"

namespace rmc {

double fma_loop_avx512(int64_t iterations) { return fma_loop<64>(iterations); }

float read_loop_avx512(const float* data, int64_t count) { return read_loop<64>(data, count); }

}  // namespace rmc
