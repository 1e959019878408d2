// The loops of loops.h written once over the compiler's vector type, for the file of each instruction set to include.
#pragma once
#include <cstdint>

namespace rmc {
// Internal linkage: with external linkage the linker would keep one copy for all files, perhaps one that this CPU
// cannot execute.
namespace {

template <int kBytes>
struct Vector {
  typedef float type __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / static_cast<int>(sizeof(float));
};

volatile float sink;

template <int kBytes>
double fma_loop(int64_t iterations) {
  using V = typename Vector<kBytes>::type;
  // Two units of latency four need eight independent chains. They have names because compilers put an indexed array
  // into memory, and different starts because compilers merge equal chains into one.
  const V scale = V{} + 0.999f, step = V{} + 1e-3f;
  V a = step, b = a + step, c = b + step, d = c + step, e = d + step;
  V f = e + step, g = f + step, h = g + step, i = h + step, j = i + step;
  for (int64_t n = 0; n < iterations; n++) {
    a = a * scale + step;
    b = b * scale + step;
    c = c * scale + step;
    d = d * scale + step;
    e = e * scale + step;
    f = f * scale + step;
    g = g * scale + step;
    h = h * scale + step;
    i = i * scale + step;
    j = j * scale + step;
  }
  const V sum = a + b + c + d + e + f + g + h + i + j;
  sink = sum[0];
  return 2.0 * 10 * Vector<kBytes>::kLanes * static_cast<double>(iterations);
}

template <int kBytes>
float read_loop(const float* data, int64_t count) {
  using V = typename Vector<kBytes>::type;
  constexpr int kChains = 8;
  const V* vectors = reinterpret_cast<const V*>(data);
  V a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{};
  for (int64_t n = 0; n < count / Vector<kBytes>::kLanes; n += kChains) {
    a += vectors[n];
    b += vectors[n + 1];
    c += vectors[n + 2];
    d += vectors[n + 3];
    e += vectors[n + 4];
    f += vectors[n + 5];
    g += vectors[n + 6];
    h += vectors[n + 7];
  }
  const V sum = a + b + c + d + e + f + g + h;
  float total = 0;
  for (int lane = 0; lane < Vector<kBytes>::kLanes; lane++) total += sum[lane];
  return total;
}

}  // namespace
}  // namespace rmc
