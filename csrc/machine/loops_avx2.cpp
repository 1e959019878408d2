#include "machine/loops.h"
#include "machine/vector_loops.h"

namespace rmc {

double fma_loop_avx2(int64_t iterations) { return fma_loop<32>(iterations); }

float read_loop_avx2(const float* data, int64_t count) { return read_loop<32>(data, count); }

}  // namespace rmc
