#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "bindings/dlpack.hpp"
#include "pairwise/dtype.hpp"

// How the core sees an array of NumPy, PyTorch, CuPy or anything else that speaks DLPack or the buffer protocol: a
// pointer with a shape and strides, borrowed for the duration of one call. Bindings use `input` and `output`, which
// check everything that a kernel relies on and raise a ValueError or TypeError that names the argument.

namespace nearfar {

namespace py = pybind11;

using DTypes = std::initializer_list<DType>;
inline constexpr DTypes kFloats = {DType::f16, DType::bf16, DType::f32, DType::f64};
inline constexpr DTypes kAllTypes = {DType::f16, DType::bf16, DType::f32, DType::f64, DType::i32, DType::i64};

// Destroy it with the GIL held: `owner` keeps the memory alive.
struct Array {
  void* data = nullptr;
  int ndim = 0;
  int64_t shape[4] = {}, strides[4] = {};  // strides in elements, of any sign
  DType dtype = DType::f32;
  int device_type = kDLCPU, device_id = 0;
  bool readonly = false;
  const char* path = "";  // the protocol that gave it: "exchange", "dlpack" or "buffer"
  py::object owner;

  template <class T>
  T* as() const {
    return static_cast<T*>(data);
  }
  bool on_cpu() const { return device_type == kDLCPU || device_type == kDLCUDAHost || device_type == kDLCUDAManaged; }
  bool contiguous() const;  // in C order
};

// Any device, any rank up to 4, any strides.
Array borrow(py::handle obj, const char* name, DTypes allowed = kAllTypes);

// Where a batch of matrices is read, or `shape` is to be filled, a batch of one may come without its axis: views that
// add and remove it, and their derivatives, would take as long as a small matrix.
void add_batch(Array& a, int ndim);
void add_batch(Array& a, const int64_t* shape, int ndim);

// An array that a CPU operation reads: any strides, also zero and negative ones.
Array input(py::handle obj, const char* name, int ndim, DTypes allowed = kFloats);

// Memory that a CPU operation fills: writable, C-contiguous, of exactly this type and shape. The caller keeps `obj`.
void* output(py::handle obj, const char* name, DType dtype, const int64_t* shape, int ndim);

template <class T>
T* output(py::handle obj, const char* name, std::initializer_list<int64_t> shape) {
  constexpr bool is_float = std::is_floating_point_v<T>, is_wide = sizeof(T) == 8;
  static_assert((is_float || std::is_signed_v<T>) && (is_wide || sizeof(T) == 4), "float, double, int32_t or int64_t");
  constexpr DType dtype = is_float ? (is_wide ? DType::f64 : DType::f32) : (is_wide ? DType::i64 : DType::i32);
  return static_cast<T*>(output(obj, name, dtype, shape.begin(), static_cast<int>(shape.size())));
}

// ---- messages: "name: text" -------------------------------------------------------------------------------

[[noreturn]] void refuse_type(const char* name, const std::string& text);
[[noreturn]] void refuse_value(const char* name, const std::string& text);

const char* name_of(DType type);                        // "float16"
std::string device_of(const Array& a);                  // "cpu", "cuda:0"
std::string text_of(const int64_t* values, int count);  // "(512, 128)"
inline std::string shape_of(const Array& a) { return text_of(a.shape, a.ndim); }

}  // namespace nearfar
