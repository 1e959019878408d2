// A planned cell and packed weights, as Python holds them.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cell/kernels.h"
#include "cell/plan.h"
#include "common/interrupt.h"
#include "common/profile.h"
#include "common/scratch.h"
#include "python/without_gil.h"

namespace rmc {

namespace py = pybind11;
using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Bytes of a number outside of products.
inline int64_t itemsize(const Plan& plan) { return plan.precision == Precision::kFloat64 ? 8 : 4; }

class PackedWeights {
 public:
  PackedWeights(std::shared_ptr<const Plan> plan, const std::vector<Address>& params, bool backward)
      : plan_(std::move(plan)), backward_(backward) {
    const int64_t count = backward ? plan_->all_weights : plan_->forward_weights;
    const size_t bytes = (static_cast<size_t>(count * itemsize(*plan_)) + 63) / 64 * 64;
    data_ = std::aligned_alloc(64, bytes);
    if (!data_) throw std::bad_alloc();
    kernels(plan_->isa, plan_->precision)
        .pack(*plan_, reinterpret_cast<const void* const*>(params.data()), backward, data_);
  }
  ~PackedWeights() { std::free(data_); }
  PackedWeights(const PackedWeights&) = delete;
  PackedWeights& operator=(const PackedWeights&) = delete;

  // Null where they cannot serve: the caller then packs.
  const void* data_for(const Plan& plan, bool backward) const {
    if (&plan != plan_.get()) throw std::invalid_argument("packed: these weights belong to another cell");
    return backward && !backward_ ? nullptr : data_;
  }

 private:
  std::shared_ptr<const Plan> plan_;
  bool backward_;
  void* data_ = nullptr;
};

// One cell, planned.
class Cell {
 public:
  Cell(const CellConfig& config, Isa isa, Precision precision)
      : plan_(make_plan(config, isa, precision)),
        kernels_(kernels(plan_->isa, plan_->precision)),
        activations_(kernels_.activation_size(*plan_)) {}

  const char* isa() const { return name(plan_->isa); }
  const Plan& plan() const { return *plan_; }
  // Bytes of saved activations: steps * (batch * first + second).
  py::tuple activation_bytes() const {
    return py::make_tuple(activations_.per_element * itemsize(*plan_), activations_.per_tile * itemsize(*plan_));
  }

  std::unique_ptr<PackedWeights> pack(const std::vector<Address>& params, bool backward) const {
    check(params);
    const WithoutGil unlocked;
    return std::make_unique<PackedWeights>(plan_, params, backward);
  }

  // Tensors as addresses, which the caller has checked.
  void forward(const py::tuple& sizes, const py::tuple& pointers, const py::tuple& params, const PackedWeights* packed,
               Address memories, Address activations, int64_t activation_bytes) const {
    Arguments a(*this, sizes, pointers, params);
    a.in.memories = pointer<void>(memories);
    run(a.in, packed, activations, activation_bytes);
  }

  // grads: gradient of the memories; then where to write those of x, memory, reset memory (0: not wanted).
  void backward(const py::tuple& sizes, const py::tuple& pointers, const py::tuple& params, const PackedWeights* packed,
                Address memories, Address activations, int64_t activation_bytes, const py::tuple& grads,
                const py::tuple& param_grads) const {
    Arguments a(*this, sizes, pointers, params);
    a.in.memories = pointer<void>(memories);
    const std::vector<void*> wanted = addresses<void>(param_grads);
    check(wanted);
    CellGradients out;
    out.memories = pointer<void>(grads[0].cast<Address>());
    out.x = pointer<void>(grads[1].cast<Address>());
    out.memory = pointer<void>(grads[2].cast<Address>());
    out.reset_memory = pointer<void>(grads[3].cast<Address>());
    out.params = wanted.data();
    run_back(a.in, packed, activations, activation_bytes, out);
  }

  // `forward` on inputs that were checked; weights and activations are checked here.
  void run(CellInputs in, const PackedWeights* packed, Address activations, int64_t activation_bytes) const {
    complete(in, packed, false, activations, activation_bytes);
    // The first touch of small pages took longer than writing them: 100 MB 80 ms, with huge ones 23.
    if (activations) prefer_huge_pages(in.activations, static_cast<size_t>(activation_bytes));
    without_gil([&] { kernels_.forward(*plan_, in); });
  }

  // The same of `backward`.
  void run_back(CellInputs in, const PackedWeights* packed, Address activations, int64_t activation_bytes,
                CellGradients out) const {
    complete(in, packed, true, activations, activation_bytes);
    if (std::all_of(out.params, out.params + plan_->params, [](void* p) { return !p; })) out.params = nullptr;
    without_gil([&] { kernels_.backward(*plan_, in, out); });
  }

 private:
  // An interrupted call ends in the exception of the signal's handler.
  template <class Function>
  static void without_gil(Function&& function) {
    try {
      const WithoutGil unlocked;
      const CallClock clock;
      function();
    } catch (const Interrupted&) {
      throw py::error_already_set();
    }
  }

  struct Arguments {
    CellInputs in;
    std::vector<const void*> params;

    Arguments(const Cell& cell, const py::tuple& sizes, const py::tuple& pointers, const py::tuple& list) {
      in.batch = sizes[0].cast<int64_t>();
      in.steps = sizes[1].cast<int64_t>();
      in.threads = sizes[2].cast<int>();
      if (in.batch < 0 || in.steps < 0) throw std::invalid_argument("sizes: negative");
      in.x = pointer<void>(pointers[0].cast<Address>());
      in.memory = pointer<void>(pointers[1].cast<Address>());
      in.lengths = pointer<int64_t>(pointers[2].cast<Address>());
      in.resets = pointer<bool>(pointers[3].cast<Address>());
      in.reset_memory = pointer<void>(pointers[4].cast<Address>());
      in.dropout_mask = pointer<void>(pointers[5].cast<Address>());
      if (in.resets && !in.reset_memory && in.batch) throw std::invalid_argument("reset_memory: missing");
      params = addresses<const void>(list);
      cell.check(params);
      in.params = params.data();
    }
  };

  void complete(CellInputs& in, const PackedWeights* packed, bool backward, Address activations, int64_t bytes) const {
    in.packed = packed ? packed->data_for(*plan_, backward) : nullptr;
    if (!activations) return;
    if (bytes < in.steps * (in.batch * activations_.per_element + activations_.per_tile) * itemsize(*plan_))
      throw std::invalid_argument("activations: the buffer is too small");
    in.activations = pointer<void>(activations);
  }

  template <class T>
  static std::vector<T*> addresses(const py::tuple& list) {
    std::vector<T*> out;
    out.reserve(list.size());
    for (py::handle item : list) out.push_back(pointer<T>(item.cast<Address>()));
    return out;
  }
  template <class T>
  void check(const std::vector<T>& params) const {
    if (static_cast<int64_t>(params.size()) != plan_->params)
      throw std::invalid_argument("params: takes " + std::to_string(plan_->params) + ", got " +
                                  std::to_string(params.size()));
  }

  std::shared_ptr<const Plan> plan_;
  const Kernels& kernels_;
  ActivationSize activations_;
};

}  // namespace rmc
