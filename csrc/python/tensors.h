// Tensors of torch, read and made without a call of Python: a tenth of a microsecond to read one, where data_ptr(),
// shape, dtype, device and is_contiguous() together take a whole one. Needs the table of C functions that torch
// publishes from 2.10 on. Every function needs the GIL.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <utility>

#include "python/dlpack.h"
#include "python/new_tensor.h"

namespace rmc {

namespace py = pybind11;

inline py::object checked(PyObject* result) {
  if (!result) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

class Tensors {
 public:
  // api: `Tensor.__dlpack_c_exchange_api__`; types: the classes whose tensors are plain memory; is_neg:
  // `Tensor.is_neg`.
  Tensors(const py::capsule& api, py::tuple types, const py::object& is_neg) : types_(std::move(types)) {
    if (std::strcmp(api.name(), kDlpackCapsule) != 0) throw std::invalid_argument("api must be a DLPack exchange API");
    for (api_ = api.get_pointer<DLPackExchangeAPI>(); api_ && api_->major != kDlpackMajor;) api_ = api_->previous;
    if (!api_ || !api_->borrow || !api_->to_object) throw std::invalid_argument("api must have a known version");
    // Called without being looked up: 0.05 us instead of 0.1.
    if (!Py_IS_TYPE(is_neg.ptr(), &PyMethodDescr_Type)) throw py::type_error("is_neg must be a method descriptor");
    const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(is_neg.ptr())->d_method;
    if (method->ml_flags != METH_NOARGS) throw py::type_error("is_neg must be a method without arguments");
    is_neg_ = method->ml_meth;
  }

  // What `object` is, whatever its class.
  bool borrow(PyObject* object, DLTensor& out) const { return rmc::borrow(*api_, object, out); }

  // Whether `object` is a tensor in plain memory of the CPU, with no sign left to be flipped; any dtype and strides.
  bool read(PyObject* object, DLTensor& out) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (std::none_of(types_.begin(), types_.end(), [&](py::handle t) { return t.ptr() == type; })) return false;
    return checked(is_neg_(object, nullptr)).ptr() == Py_False && borrow(object, out) && out.device.type == kDlCpu;
  }

  // The same, and whether it is contiguous, of that dtype and of that shape. Freed storages have no address.
  bool read(PyObject* object, DLDataType dtype, const int64_t* shape, int32_t axes, DLTensor& out) const {
    if (!read(object, out) || !(out.dtype == dtype) || out.ndim != axes || !out.contiguous()) return false;
    return std::equal(shape, shape + axes, out.shape) && (out.data || std::count(shape, shape + axes, 0));
  }

  // Whether these are float32 tensors as `read` has them, each of its shape.
  bool all_float32(const py::tuple& tensors, const py::dict& shapes) const {
    if (tensors.size() != shapes.size()) return false;
    size_t i = 0;
    for (const auto& named : shapes) {
      DLTensor found;
      if (!read(tensors[i++].ptr(), found) || !(found.dtype == kDlFloat32)) return false;
      const auto shape = py::reinterpret_borrow<py::tuple>(named.second);
      if (static_cast<int32_t>(shape.size()) != found.ndim) return false;
      for (int32_t axis = 0; axis < found.ndim; axis++) {
        if (PyLong_AsLongLong(shape[static_cast<size_t>(axis)].ptr()) != found.shape[axis]) return false;
      }
    }
    return true;
  }

  // See `new_tensor`.
  NewTensor make(DLDataType dtype, const int64_t* shape, int32_t axes) const {
    return new_tensor(*api_, dtype, shape, axes);
  }
  NewTensor make(DLDataType dtype, std::initializer_list<int64_t> shape) const {
    return make(dtype, shape.begin(), static_cast<int32_t>(shape.size()));
  }

 private:
  const DLPackExchangeAPI* api_ = nullptr;
  py::tuple types_;
  PyCFunction is_neg_ = nullptr;
};

}  // namespace rmc
