// Tensors whose memory is allocated here and handed to torch with DLPack, as `Tensor`s of their own.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdlib>

#include "python/dlpack.h"

namespace rmc {

constexpr int32_t kMostAxes = 4;
constexpr uintptr_t kAlignment = 64;

// What torch is told of a tensor; the elements follow, from the next aligned address on.
struct TensorBlock {
  DLManagedTensor managed;
  int64_t shape[kMostAxes], strides[kMostAxes];

  char* elements() {
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(this + 1) + kAlignment - 1) / kAlignment * kAlignment);
  }
};

struct NewTensor {
  pybind11::object object;  // null where there is no memory for it
  void* data = nullptr;
};

// A contiguous tensor on the CPU, of at most kMostAxes axes, not initialized: 0.8 us to make and free one, where
// torch.empty_like takes 1.6 and Tensor.new_empty 2.9, most of it on their arguments. Its storage cannot be resized.
inline NewTensor new_tensor(const DLPackExchangeAPI& api, DLDataType dtype, const int64_t* shape, int32_t axes) {
  int64_t count = 1;
  for (int32_t i = 0; i < axes; i++) count *= shape[i];
  const size_t bytes = sizeof(TensorBlock) + kAlignment + static_cast<size_t>(count) * dtype.bits / 8;
  auto* block = static_cast<TensorBlock*>(std::malloc(bytes));
  if (!block) return {};
  int64_t stride = 1;
  for (int32_t i = axes - 1; i >= 0; i--) {
    block->shape[i] = shape[i], block->strides[i] = stride;
    stride *= block->shape[i];
  }
  const DLTensor tensor{block->elements(), {kDlCpu, 0}, axes, dtype, block->shape, block->strides, 0};
  block->managed = {api.major, api.minor, nullptr, [](DLManagedTensor* self) { std::free(self); }, 0, tensor};
  void* object = nullptr;
  // Where it fails, whether it has freed the block is not said.
  if (api.to_object(&block->managed, &object) != 0) throw pybind11::error_already_set();
  return {pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object)), tensor.data};
}

}  // namespace rmc
