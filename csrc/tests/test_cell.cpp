// What the sanitizers should see of the cell: every instruction set that this CPU can execute, all kinds of cells, and
// threads. Scratch memory starts as NaN here, so a result that is finite was computed from what was written.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "cell/hooks.h"
#include "cell/kernels.h"
#include "cell/plan.h"
#include "common/bump.h"
#include "common/interrupt.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "tests/check.h"

namespace {

struct Named {
  const char* name;
  rmc::CellConfig config;
  int64_t batch = 37;
};

std::vector<Named> cells() {
  rmc::CellConfig sonnet;
  sonnet.input_size = 7, sonnet.slots = 3, sonnet.head_size = 5, sonnet.key_size = 4, sonnet.heads = 3;
  sonnet.mlp_layers = 2, sonnet.gate = rmc::Gate::kUnit, sonnet.forget_bias = 1;
  sonnet.input_projection = sonnet.qkv_norm = sonnet.attention_norm = sonnet.mlp_norm = true;
  sonnet.attention_residual = true;
  rmc::CellConfig dense = sonnet, matrix = sonnet, l0sg = sonnet, textbook = sonnet, r2gen = sonnet;
  dense.input_size = 16, dense.head_size = dense.key_size = 16, dense.heads = 2;
  matrix.rows = 2, matrix.blocks = 2, matrix.gate = rmc::Gate::kMemory;
  l0sg.joint_norm = l0sg.relu_last = l0sg.tied = l0sg.trains_gate_biases = true;
  l0sg.mlp_layers = 3, l0sg.blocks = 2;
  textbook.gate = rmc::Gate::kNone, textbook.output_projection = true, textbook.key_size = 5;
  textbook.qkv_norm = textbook.attention_norm = textbook.attention_residual = false;
  r2gen.input_size = 15, r2gen.key_size = 5, r2gen.input_projection = false;
  r2gen.output_projection = r2gen.relu_last = true;
  r2gen.qkv_norm = r2gen.attention_norm = r2gen.mlp_norm = false;
  rmc::CellConfig many = r2gen,
                  many_live = matrix;  // slots that attention takes another way, at a padded stride and not
  many.input_size = 20, many.slots = 32, many.heads = 4;
  many_live.slots = 33;
  rmc::CellConfig deep = sonnet, rows = matrix;  // more layers and slots, and more input rows a step, than go at once
  deep.mlp_layers = 5, deep.slots = 70, deep.heads = 1;
  rows.rows = 3, rows.slots = 2, rows.blocks = 1;
  return {{"sonnet", sonnet},     {"dense", dense}, {"matrix", matrix},          {"l0sg", l0sg},    {"many", many, 3},
          {"textbook", textbook}, {"r2gen", r2gen}, {"many live", many_live, 3}, {"deep", deep, 3}, {"rows", rows, 64}};
}

template <class T>
struct Problem {
  std::shared_ptr<const rmc::Plan> plan;
  int64_t batch, steps;
  std::vector<std::vector<T>> params, param_grads;
  std::vector<T> x, memory, reset_memory, mask, memories, final_memory, grad, dx, dmemory, dreset;
  std::vector<int64_t> lengths;
  std::vector<char> activations;
  bool resets[4096] = {};

  Problem(const rmc::CellConfig& config, rmc::Isa isa, rmc::Precision precision, int64_t b, int64_t t)
      : plan(rmc::make_plan(config, isa, precision)), batch(b), steps(t) {
    const rmc::Plan& p = *plan;
    std::mt19937 random(1);
    std::uniform_real_distribution<double> uniform(-0.5, 0.5);
    auto fill = [&](std::vector<T>& v, int64_t count) {
      v.resize(static_cast<size_t>(count));
      for (T& value : v) value = static_cast<T>(uniform(random));
    };
    params.resize(static_cast<size_t>(p.params));
    auto linear = [&](const rmc::Linear& l) {
      if (l.weight < 0) return;
      fill(params[static_cast<size_t>(l.weight)], l.out.size * l.in.size);
      fill(params[static_cast<size_t>(l.bias_param)], l.out.size);
    };
    auto norm = [&](const rmc::Norm& n) {
      if (n.weight < 0) return;
      fill(params[static_cast<size_t>(n.weight)], n.rows * n.features.size);
      fill(params[static_cast<size_t>(n.bias_param)], n.rows * n.features.size);
    };
    linear(p.input), linear(p.input_gate), linear(p.memory_gate);
    for (int64_t i = 0; i < p.unique_blocks; i++) {
      const rmc::Block& block = p.block[i];
      linear(block.qkv), linear(block.output);
      norm(block.qkv_norm), norm(block.attention_norm), norm(block.mlp_norm);
    }
    for (int64_t i = 0; i < p.unique_layers; i++) linear(p.mlp[i]);
    for (int index : {p.forget_bias_param, p.input_bias_param}) {
      if (index >= 0) fill(params[static_cast<size_t>(index)], 1);
    }
    param_grads = params;
    const int64_t slots = batch * p.N * p.D;
    fill(x, batch * steps * p.n * p.I), fill(memory, slots), fill(reset_memory, slots);
    fill(memories, slots * steps), fill(final_memory, slots), fill(grad, slots * steps);
    fill(dx, batch * steps * p.n * p.I), fill(dmemory, slots), fill(dreset, slots);
    if (!p.live_inputs) fill(mask, batch * steps * p.H * p.N * p.S);
    for (int64_t i = 0; i < batch; i++) lengths.push_back(i % (steps + 2) - 1 + steps / 2);
    for (int64_t i = 0; i < batch * steps; i++) resets[i] = i % 5 == 2;
    const rmc::ActivationSize size = rmc::kernels(isa, precision).activation_size(p);
    activations.resize(static_cast<size_t>(steps * (batch * size.per_element + size.per_tile)) * sizeof(T) + 64);
  }

  template <class Other>
  void take_inputs_of(const Problem<Other>& other) {
    for (size_t i = 0; i < params.size(); i++) params[i].assign(other.params[i].begin(), other.params[i].end());
    x.assign(other.x.begin(), other.x.end()), memory.assign(other.memory.begin(), other.memory.end());
    reset_memory.assign(other.reset_memory.begin(), other.reset_memory.end());
    mask.assign(other.mask.begin(), other.mask.end()), grad.assign(other.grad.begin(), other.grad.end());
  }

  void run(int threads, bool save, bool options) {
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    for (auto& v : params) inputs.push_back(v.data());
    for (auto& v : param_grads) outputs.push_back(v.data());
    rmc::CellInputs in;
    in.batch = batch, in.steps = steps, in.threads = threads;
    in.x = x.data(), in.memory = memory.data(), in.params = inputs.data(), in.memories = memories.data();
    in.final_memory = final_memory.data();
    if (options) {
      in.lengths = lengths.data(), in.resets = resets, in.reset_memory = reset_memory.data();
      if (!mask.empty()) in.dropout_mask = mask.data();
    }
    char* aligned = activations.data() + (64 - reinterpret_cast<uintptr_t>(activations.data()) % 64) % 64;
    if (save) in.activations = aligned;
    const rmc::Kernels& table = rmc::kernels(plan->isa, plan->precision);
    table.forward(*plan, in);
    rmc::CellGradients out;
    out.memories = grad.data(), out.x = dx.data(), out.memory = dmemory.data(), out.params = outputs.data();
    if (options) out.reset_memory = dreset.data();
    table.backward(*plan, in, out);
  }

  bool final_is_last() const {
    const size_t size = static_cast<size_t>(plan->N * plan->D), elements = steps ? static_cast<size_t>(batch) : 0;
    for (size_t e = 0; e < elements; e++) {
      const T* last = &memories[((e + 1) * static_cast<size_t>(steps) - 1) * size];
      if (std::memcmp(last, &final_memory[e * size], size * sizeof(T)) != 0) return false;
    }
    return true;
  }

  std::vector<T> results() const {
    std::vector<T> all;
    for (const auto* v : {&memories, &dx, &dmemory}) all.insert(all.end(), v->begin(), v->end());
    for (const auto& v : param_grads) all.insert(all.end(), v.begin(), v.end());
    return all;
  }
};

template <class T>
bool finite(const std::vector<T>& values) {
  for (T value : values) {
    if (!std::isfinite(value)) return false;
  }
  return true;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
void test_cell(const Named& cell, rmc::Isa isa, rmc::Precision precision) {
  const char* kPrecisions[] = {" float", " bfloat16", " double"};
  const std::string what = std::string(cell.name) + " " + rmc::name(isa) + kPrecisions[static_cast<int>(precision)];
  for (auto [batch, steps] : {std::pair<int64_t, int64_t>{1, 1}, {cell.batch, 9}, {0, 3}, {2, 0}}) {
    for (bool options : {false, true}) {
      Problem<T> problem(cell.config, isa, precision, batch, steps);
      problem.run(1, false, options);
      const std::vector<T> first = problem.results();
      check(finite(first), what + " is finite");
      check(problem.final_is_last(), what + ": the final memory is that of the last step");
      problem.run(3, false, options);
      check(same(first, problem.results()), what + ": three threads give the bits of one");
      problem.run(2, true, options);
      check(finite(problem.results()), what + " from saved activations is finite");
    }
  }
}

// What AMX cannot split takes a path of its own: it must stay in its batch element.
void test_infinity(const Named& cell, rmc::Isa isa, rmc::Precision precision) {
  Problem<float> problem(cell.config, isa, precision, cell.batch, 3);
  const size_t size = problem.memories.size() / static_cast<size_t>(cell.batch);
  problem.x[0] = INFINITY;
  problem.run(1, false, false);
  const std::vector<float> others(problem.memories.begin() + static_cast<std::ptrdiff_t>(size), problem.memories.end());
  check(finite(others), std::string(cell.name) + " " + rmc::name(isa) + ": an infinity stays in its element");
  problem.params[0][0] = INFINITY;
  problem.run(2, false, false);
  check(!finite(problem.memories), "an infinite weight does not");
}

// The same numbers, any NaN being like any other.
template <class T>
bool same_but_nan(const std::vector<T>& a, const std::vector<T>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](T x, T y) { return x == y || (std::isnan(x) && std::isnan(y)); });
}

// What no step reads reaches nothing, and an infinity in each parameter the same from saved activations as from
// recomputed ones.
template <class T>
void test_not_finite(const Named& cell, rmc::Isa isa, rmc::Precision precision) {
  const std::string what = std::string(cell.name) + " " + rmc::name(isa);
  Problem<T> problem(cell.config, isa, precision, cell.batch, 3);
  problem.run(1, false, true);
  const std::vector<T> clean = problem.results();
  const size_t size = static_cast<size_t>(problem.plan->N * problem.plan->D), steps = 3;
  for (T value : {T(NAN), T(INFINITY)}) {
    for (size_t e = 0; e < problem.lengths.size(); e++) {
      if (problem.lengths[e] > 0) continue;
      for (auto* memories : {&problem.memory, &problem.reset_memory})
        std::fill_n(memories->begin() + static_cast<std::ptrdiff_t>(e * size), size, value);
    }
    for (bool save : {false, true}) {
      problem.run(2, save, true);
      for (size_t e = 0; e < problem.lengths.size(); e++) {
        if (problem.lengths[e] > 0) continue;
        const auto at = static_cast<std::ptrdiff_t>(e * steps * size);
        check(same_but_nan(std::vector<T>(steps * size, value),
                           std::vector<T>(problem.memories.begin() + at,
                                          problem.memories.begin() + at + static_cast<std::ptrdiff_t>(steps * size))),
              what + ": an element that never runs keeps its memory");
        std::copy_n(clean.begin() + at, steps * size, problem.memories.begin() + at);
      }
      check(same(clean, problem.results()), what + ": its memory reaches nothing else");
    }
  }
  for (size_t i = 0; i < problem.params.size(); i++) {
    Problem<T> spoiled(cell.config, isa, precision, 5, 2);
    spoiled.params[i].back() = T(INFINITY);
    spoiled.run(1, false, false);
    const std::vector<T> recomputed = spoiled.results();
    spoiled.run(1, true, false);
    check(same_but_nan(recomputed, spoiled.results()), what + ": an infinite parameter in saved activations");
  }
}

// The errors of both passes against float64, pooled over all results, are at most those that `rmc verify` allows over
// the errors of the generic build.
void test_right(const Named& cell, rmc::Isa isa) {
  const rmc::Precision precision = rmc::Precision::kFloat32;
  struct Errors {
    double squares = 0, largest = 0;
  };
  Problem<float> generic(cell.config, rmc::Isa::kGeneric, precision, cell.batch, 5);
  Problem<float> ours(cell.config, isa, precision, cell.batch, 5);
  Problem<double> exact(cell.config, rmc::Isa::kGeneric, rmc::Precision::kFloat64, cell.batch, 5);
  exact.take_inputs_of(generic);
  for (bool options : {false, true}) {
    generic.run(1, false, options), ours.run(1, false, options), exact.run(1, false, options);
    const std::vector<double> truth = exact.results();
    auto errors = [&](const std::vector<float>& results) {
      Errors found;
      for (size_t i = 0; i < truth.size(); i++) {
        const double error = std::abs(static_cast<double>(results[i]) - truth[i]);
        found.squares += error * error, found.largest = std::max(found.largest, error);
      }
      return found;
    };
    const Errors a = errors(ours.results()), b = errors(generic.results());
    const std::string what = std::string(cell.name) + " " + rmc::name(isa);
    check(a.squares <= 4 * b.squares, what + " is as exact as the generic build");
    check(a.largest <= 4 * b.largest, what + ": no result is far off");
  }
}

// exp and tanh, as simd/math.h promises: in units in the last place, and the root mean square between two powers of 2.
void test_math(rmc::Isa isa) {
  constexpr int kPoints = 8192;
  struct Function {
    int number;
    const char* name;
    double (*exact)(double);
  };
  for (const Function& f : {Function{0, "exp", std::exp}, Function{2, "tanh", std::tanh}}) {
    for (int exponent = -10; exponent < 6; exponent++) {
      std::vector<float> x(kPoints), y(kPoints);
      for (int i = 0; i < kPoints; i++)
        x[static_cast<size_t>(i)] = (i % 2 ? -1.f : 1.f) * std::ldexp(1 + static_cast<float>(i) / kPoints, exponent);
      rmc::hooks(isa).apply(f.number, x.data(), y.data(), kPoints);
      double squares = 0, largest = 0;
      for (size_t i = 0; i < x.size(); i++) {
        const double exact = f.exact(x[i]);
        const double unit = std::ldexp(1.0, std::ilogb(exact) - 23);
        const double error = std::abs(static_cast<double>(y[i]) - exact) / unit;
        squares += error * error, largest = std::max(largest, error);
      }
      const bool rounds_to_1 = f.number == 0 && exponent < -6;  // even the exact result rounded errs by 0.38 there
      const std::string what = std::string(f.name) + " " + rmc::name(isa) + " from 2^" + std::to_string(exponent);
      check(largest <= 1.0, what + " errs by " + std::to_string(largest));
      check(rounds_to_1 || std::sqrt(squares / kPoints) <= 0.35, what + " errs by more than 0.35 in the mean");
    }
  }
}

// Sizes at which weights or gradient accumulators are more than a thread keeps between calls, with threads that end
// while others still read them.
void test_large(const rmc::CellConfig& cell) {
  struct Size {
    int64_t width, heads, slots, batch, steps;
  };
  for (const Size& s : {Size{2048, 8, 4, 1, 2}, Size{1024, 8, 3, 64, 2}, Size{256, 4, 8, 72, 4}}) {
    rmc::CellConfig config = cell;
    config.input_size = s.width, config.slots = s.slots, config.heads = s.heads;
    config.head_size = config.key_size = s.width / s.heads;
    Problem<float> problem(config, rmc::supported_isas().back(), rmc::Precision::kFloat32, s.batch, s.steps);
    problem.run(1, false, false);
    const std::vector<float> first = problem.results();
    check(finite(first), "a large cell is finite");
    problem.run(2, false, false);
    check(same(first, problem.results()), "two threads give a large cell the bits of one");
  }
}

// Two callers at once, each with threads of its own.
void test_callers(const Named& cell, rmc::Isa isa) {
  const rmc::Precision precision = rmc::Precision::kFloat32;
  Problem<float> one(cell.config, isa, precision, 37, 5), other(cell.config, isa, precision, 37, 5);
  std::thread caller([&] { one.run(2, false, true); });
  other.run(2, false, true);
  caller.join();
  check(same(one.results(), other.results()), "two callers do not meet");
}

void test_exceptions() {
  for (int threads : {1, 3}) {
    bool caught = false;
    try {
      rmc::parallel_for(8, threads, [](int64_t i) {
        if (i == 5) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    check(caught, "an exception leaves a parallel region as itself");
  }
}

// Many callers share the pool; each gets all of its tasks done once.
void test_pool() {
  constexpr int kCallers = 4, kTasks = 37, kRounds = 50;
  std::vector<std::thread> callers;
  std::vector<int> wrong(kCallers, 0);
  for (int c = 0; c < kCallers; c++) {
    callers.emplace_back([c, &wrong] {
      for (int round = 0; round < kRounds; round++) {
        std::vector<int> done(kTasks, 0);
        rmc::parallel_for(kTasks, 2 + (c + round) % 3, [&](int64_t i) { done[static_cast<size_t>(i)]++; });
        for (int times : done) wrong[static_cast<size_t>(c)] += times != 1;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (int count : wrong) check(count == 0, "each task of each call runs once");
}

// An interrupted call stops before its last step, and the next one is right.
void test_interrupt(const Named& cell) {
  const rmc::Isa isa = rmc::supported_isas().back();
  for (int threads : {1, 3}) {
    Problem<float> right(cell.config, isa, rmc::Precision::kFloat32, 64, 5);
    Problem<float> stopped(cell.config, isa, rmc::Precision::kFloat32, 64, 5);
    right.run(threads, false, false);
    for (auto* written : {&stopped.memories, &stopped.dmemory}) std::fill(written->begin(), written->end(), 12345.0f);
    bool caught = false;
    rmc::set_interrupt_question([] { return true; });
    try {
      stopped.run(threads, false, false);
    } catch (const rmc::Interrupted&) {
      caught = true;
    }
    rmc::set_interrupt_question(nullptr);
    int64_t untouched = 0;
    for (const auto* written :
         {&stopped.memories, &stopped.dmemory}) {  // of the way back too: the others may be faster
      for (float value : *written) untouched += value == 12345;
    }
    // Only the caller asks: where the others were faster all along it had nothing to do.
    check(caught == (untouched > 0), "a call ends early exactly where it is interrupted");
    check(caught || threads > 1, "a call is interrupted");
    stopped.run(threads, false, false);
    check(same(right.results(), stopped.results()), "an interruption leaves nothing behind");
  }
}

}  // namespace

// Under the address sanitizer, what lies behind a part of the scratch memory may not be touched, down to the byte.
void test_red_zones() {
#ifdef __SANITIZE_ADDRESS__
  auto bind = [](rmc::Bump& bump) {
    char* part = bump.take<char>(100);
    return std::pair(part, bump.take<char>(64));
  };
  const rmc::TaskScratch memory(rmc::TaskScratch::kTile, rmc::measured(bind));
  rmc::Bump bump(memory);
  const auto [first, second] = bind(bump);
  check(!__asan_region_is_poisoned(first, 100), "red zones: a part is free to use");
  check(__asan_address_is_poisoned(first + 100), "red zones: the byte behind a part that fills no line");
  check(second - first == 192 && __asan_address_is_poisoned(second - 1), "red zones: a line between parts");
  check(__asan_address_is_poisoned(second + 64), "red zones: the byte behind the last part");
#endif
}

void test_measured() {
  const rmc::TaskScratch memory(rmc::TaskScratch::kTile, rmc::measured([](rmc::Bump& bump) { bump.take<char>(64); }));
  rmc::Bump bump(memory);
  bump.take<char>(64);
  bool caught = false;
  try {
    bump.take<char>(1);
  } catch (const std::logic_error&) {
    caught = true;
  }
  check(caught, "a part that was not measured is refused");
}

// A block of a call outlives those of its tasks, on this thread too, whatever their sizes; another call in the middle
// of it gets another.
void test_owners() {
  for (const size_t size : {size_t{1} << 12, size_t{80} << 20}) {
    const rmc::CallScratch call(rmc::CallScratch::kWeights, size);
    std::memset(call.as<char>(), 1, size);
    for (int i = 0; i < 2; i++) {
      const rmc::TaskScratch task(rmc::TaskScratch::kTile, size);
      const rmc::CallScratch inner(rmc::CallScratch::kWeights, size);
      check(inner.as<char>() != call.as<char>(), "a call in another has memory of its own");
      std::memset(task.as<char>(), 2, size), std::memset(inner.as<char>(), 3, size);
    }
    check(call.as<char>()[0] == 1 && call.as<char>()[size - 1] == 1, "a call keeps its memory");
  }
}

// Arguments: the instruction sets to test, where an emulator takes too long for the large cells, which test no set. All
// that this CPU can execute without any.
int main(int count, char** arguments) {
  const bool emulated = count > 1;
  std::vector<rmc::Isa> isas;
  for (int i = 1; i < count; i++) isas.push_back(rmc::parse_isa(arguments[i]));
  if (isas.empty()) isas = rmc::supported_isas();
  test_red_zones();
  test_measured();
  test_owners();
  for (rmc::Isa isa : isas) test_math(isa);
  for (const Named& cell : cells()) {
    for (rmc::Isa isa : isas) {
      test_right(cell, isa);
      for (rmc::Precision precision : {rmc::Precision::kFloat32, rmc::Precision::kBfloat16}) {
        if (precision == rmc::Precision::kBfloat16 && isa < rmc::Isa::kAvx512Bf16) continue;
        test_cell<float>(cell, isa, precision);
        test_infinity(cell, isa, precision);
        test_not_finite<float>(cell, isa, precision);
      }
    }
    if (isas.front() != rmc::Isa::kGeneric) continue;
    test_cell<double>(cell, rmc::Isa::kGeneric, rmc::Precision::kFloat64);
    test_not_finite<double>(cell, rmc::Isa::kGeneric, rmc::Precision::kFloat64);
  }
  if (!emulated) test_large(cells().front().config);
  test_callers(cells().front(), isas.back());
  test_exceptions();
  test_pool();
  test_interrupt(cells().front());
  std::printf("%d failures\n", failures);
  return failures != 0;
}
