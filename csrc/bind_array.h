// For the bindings: arrays of the caller, seen in place.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "common/check.h"

namespace tml::bind {

namespace py = pybind11;

template <typename T>
constexpr const char* kTypeName = nullptr;
template <>
inline constexpr const char* kTypeName<uint8_t> = "uint8";
template <>
inline constexpr const char* kTypeName<int32_t> = "int32";
template <>
inline constexpr const char* kTypeName<int64_t> = "int64";

// A caller's contiguous array. BufferError where it is to be written and cannot be.
template <typename T>
class Array {
 public:
  Array(const py::buffer& array, const char* name, bool writable) : info_(array.request(writable)) {
    TML_CHECK(info_.item_type_is_equivalent_to<T>(), name, ": expected ", kTypeName<T>, ", got ",
              info_.format);
    TML_CHECK(PyBuffer_IsContiguous(info_.view(), 'C') != 0, name, " is not contiguous");
  }

  // An array of these axes, [groups, T] or the like.
  Array(const py::buffer& array, const char* name, bool writable, int num_axes, const char* axes)
      : Array(array, name, writable) {
    TML_CHECK(info_.ndim == num_axes, name, ": expected ", axes, ", got ndim=", info_.ndim);
  }

  int64_t size() const { return info_.size; }
  int64_t size(int axis) const { return info_.shape[axis]; }
  T* data() const { return static_cast<T*>(info_.ptr); }

 private:
  py::buffer_info info_;
};

}  // namespace tml::bind
