// What a call relies on that may change between calls, compared in C++: where things are found, what functions answer,
// how tensors lie. Objects are borrowed: owned here, they would hide cycles from Python's collector.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <vector>

#include "common/dlpack.h"

namespace rmc {

namespace py = pybind11;

// dictionary[key] is value, or there is none.
class Place {
 public:
  explicit Place(const py::tuple& of) : Place(of[0], of[1], of.size() > 2 ? of[2] : py::object()) {}
  Place(const py::object& dictionary, const py::object& key, const py::object& value)
      : dictionary_(dictionary.ptr()), key_(key.ptr()), value_(value.ptr()) {
    if (!PyDict_Check(dictionary_)) throw py::type_error("places: takes (dictionary, key, value) or (dictionary, key)");
  }
  bool holds() const {
    PyObject* found = PyDict_GetItemWithError(dictionary_, key_);
    if (!found) PyErr_Clear();
    return found == value_;
  }

 private:
  PyObject *dictionary_, *key_, *value_;
};

// function(*arguments) is answer; one argument at most.
class Question {
 public:
  explicit Question(const py::tuple& of) : function_(of[0].ptr()), arguments_(of[1].ptr()), answer_(of[2].ptr()) {
    if (!PyTuple_Check(arguments_) || PyTuple_GET_SIZE(arguments_) > 1)
      throw py::type_error("questions: takes (function, arguments, answer), arguments a tuple of one at most");
  }
  bool holds() const {
    const Py_ssize_t count = PyTuple_GET_SIZE(arguments_);
    PyObject* const argument = count ? PyTuple_GET_ITEM(arguments_, 0) : nullptr;
    const auto found = py::reinterpret_steal<py::object>(
        PyObject_Vectorcall(function_, &argument, static_cast<size_t>(count), nullptr));
    if (!found) throw py::error_already_set();
    return found.ptr() == answer_;
  }

 private:
  PyObject *function_, *arguments_, *answer_;
};

// A parameter: still the tensor that it was and, with a version, not written to since torch counted that.
class Parameter {
 public:
  Parameter(const DLPackExchangeAPI& api, py::handle tensor) : tensor_(tensor.ptr()) {
    DLTensor t;
    if (!borrow(api, tensor_, t) || t.device.type != kDlCpu || !t.data || !t.contiguous())
      throw std::invalid_argument("params: takes contiguous tensors on the CPU");
    data_ = t.begin(), dtype_ = t.dtype, shape_.assign(t.shape, t.shape + t.ndim);
  }
  const void* data() const { return data_; }
  DLDataType dtype() const { return dtype_; }

  bool holds(const DLPackExchangeAPI& api) const {
    DLTensor t;
    return borrow(api, tensor_, t) && t.begin() == data_ && t.dtype == dtype_ &&
           t.ndim == static_cast<int32_t>(shape_.size()) &&
           std::memcmp(t.shape, shape_.data(), shape_.size() * sizeof(int64_t)) == 0 && t.contiguous();
  }
  // Enough of a parameter that was packed and is not read again, as `FrozenWeights.check` has it.
  bool lies_there(const DLPackExchangeAPI& api) const {
    DLTensor t;
    return borrow(api, tensor_, t) && t.begin() == data_;
  }
  // `attribute` is that of Tensor._version: to look it up takes longer than to call it.
  bool has_version(const PyGetSetDef& attribute, PyObject* version) const {
    if (version == Py_None) return true;  // of an inference tensor, which has none
    const auto now = py::reinterpret_steal<py::object>(attribute.get(tensor_, attribute.closure));
    const int same = now ? PyObject_RichCompareBool(now.ptr(), version, Py_EQ) : -1;
    if (same < 0) PyErr_Clear();
    return same == 1;
  }

 private:
  PyObject* tensor_;
  const void* data_;
  DLDataType dtype_;
  std::vector<int64_t> shape_;
};

}  // namespace rmc
