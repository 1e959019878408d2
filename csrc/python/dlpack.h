// Tensors as C sees them, without the headers of torch: the DLPack structures (version 1, github.com/dmlc/dlpack), and
// a reader through the table of functions that tensor classes publish as `__dlpack_c_exchange_api__`.
#pragma once
#include <Python.h>

#include <cstdint>

namespace rmc {

struct DLDevice {
  int32_t type, id;
};
constexpr int32_t kDlCpu = 1;

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;

  bool operator==(const DLDataType& other) const {
    return code == other.code && bits == other.bits && lanes == other.lanes;
  }
};
constexpr DLDataType kDlFloat32{2, 32, 1}, kDlFloat64{2, 64, 1}, kDlInt64{0, 64, 1}, kDlBool{6, 8, 1};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;  // strides may be null: contiguous
  uint64_t byte_offset;

  char* begin() const { return static_cast<char*>(data) + byte_offset; }

  bool contiguous() const {
    int64_t expected = 1;
    bool dense = true;
    for (int32_t i = ndim - 1; strides && i >= 0; i--) {
      dense = dense && (shape[i] == 1 || strides[i] == expected);
      expected *= shape[i];
    }
    return dense || expected == 0;  // no elements, whatever the strides
  }
};

// A tensor with what is to be done when it is freed.
struct DLManagedTensor {
  uint32_t major, minor;
  void* context;
  void (*deleter)(DLManagedTensor* self);
  uint64_t flags;
  DLTensor tensor;
};

struct DLPackExchangeAPI {
  uint32_t major, minor;
  DLPackExchangeAPI* previous;
  void *allocate, *from_object;
  int (*to_object)(DLManagedTensor* tensor, void** out);  // takes the tensor over; may be null
  int (*borrow)(void* object, DLTensor* out);             // may be null
  void* current_stream;
};
constexpr const char* kDlpackCapsule = "dlpack_exchange_api";
constexpr uint32_t kDlpackMajor = 1;

// What `object` is, borrowed for as long as nothing changes it; false where it cannot be told. Needs the GIL.
inline bool borrow(const DLPackExchangeAPI& api, PyObject* object, DLTensor& out) {
  if (api.borrow(object, &out) == 0) return true;
  PyErr_Clear();
  return false;
}

}  // namespace rmc
