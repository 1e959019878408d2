// What a call relies on that may change between calls, compared in C++: where things are found, what functions answer,
// how tensors lie. Objects are borrowed: owned here, they would hide cycles from Python's collector.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "python/dlpack.h"

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
  PyObject* dictionary() const { return dictionary_; }
  bool holds() const {
    PyObject* found = PyDict_GetItemWithError(dictionary_, key_);
    if (!found) PyErr_Clear();
    return found == value_;
  }

 private:
  PyObject *dictionary_, *key_, *value_;
};

// The places of one dictionary.
class Places {
 public:
  explicit Places(PyObject* dictionary) : dictionary_(dictionary) {}
  PyObject* dictionary() const { return dictionary_; }
  void add(const Place& place) { places_.push_back(place); }

  bool holds() {
    const uint64_t version = version_of(dictionary_);
    if (version && version == version_) return true;
    for (const Place& place : places_) {
      if (!place.holds()) return false;
    }
    version_ = version;
    return true;
  }

 private:
  // A number that no other state of any dictionary has (PEP 509), to spare the lookups: 1.2 us of a step. Python has
  // it up to 3.11; 0 elsewhere.
  static uint64_t version_of([[maybe_unused]] PyObject* dictionary) {
#if PY_VERSION_HEX < 0x030c0000 && !defined(PYPY_VERSION)
    return reinterpret_cast<PyDictObject*>(dictionary)->ma_version_tag;
#else
    return 0;
#endif
  }
  PyObject* dictionary_;
  std::vector<Place> places_;
  uint64_t version_ = 0;
};

inline std::vector<Places> by_dictionary(const py::object& places) {
  std::vector<Places> out;
  for (py::handle item : places) {
    const Place place(item.cast<py::tuple>());
    auto same = [&](const Places& found) { return found.dictionary() == place.dictionary(); };
    auto found = std::find_if(out.begin(), out.end(), same);
    if (found == out.end()) found = out.emplace(out.end(), place.dictionary());
    found->add(place);
  }
  return out;
}

// function() is answer.
class Question {
 public:
  explicit Question(const py::tuple& of) : function_(of[0].ptr()), answer_(of[1].ptr()) {}
  bool holds() const {
    const auto found = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function_));
    if (!found) throw py::error_already_set();
    return found.ptr() == answer_;
  }

 private:
  PyObject *function_, *answer_;
};

// object is of this very type.
class Type {
 public:
  explicit Type(const py::tuple& of) : object_(of[0].ptr()), type_(of[1].ptr()) {
    if (!PyType_Check(type_)) throw py::type_error("types: takes (object, type)");
  }
  bool holds() const { return Py_IS_TYPE(object_, reinterpret_cast<PyTypeObject*>(type_)); }

 private:
  PyObject *object_, *type_;
};

// type.name is value, as found in the type or what it inherits from.
class Attribute {
 public:
  explicit Attribute(const py::tuple& of) : type_(of[0].ptr()), name_(of[1].ptr()), value_(of[2].ptr()) {
    if (!PyType_Check(type_)) throw py::type_error("attributes: takes (type, name, value)");
  }
  bool holds() const { return _PyType_Lookup(reinterpret_cast<PyTypeObject*>(type_), name_) == value_; }

 private:
  PyObject *type_, *name_, *value_;
};

// A method of tensors that takes nothing, to be called without being looked up.
class TensorMethod {
 public:
  explicit TensorMethod(const py::object& descriptor) {
    if (!Py_IS_TYPE(descriptor.ptr(), &PyMethodDescr_Type)) throw std::invalid_argument("methods: takes descriptors");
    const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(descriptor.ptr())->d_method;
    if (method->ml_flags != METH_NOARGS) throw std::invalid_argument("methods: takes those without arguments");
    function_ = method->ml_meth;
  }
  py::object operator()(PyObject* tensor) const {
    auto result = py::reinterpret_steal<py::object>(function_(tensor, nullptr));
    if (!result) throw py::error_already_set();
    return result;
  }

 private:
  PyCFunction function_;
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
  // Enough of a parameter that was packed and is not read again, as `FrozenWeights.check` has it. To ask for the
  // address alone takes 0.08 us, to borrow 0.1.
  bool lies_there(const TensorMethod& data_ptr) const {
    const void* address = PyLong_AsVoidPtr(data_ptr(tensor_).ptr());
    if (!address) PyErr_Clear();
    return address == data_;
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
