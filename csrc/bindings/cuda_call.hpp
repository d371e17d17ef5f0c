// The arrays of one call on the device, and the call itself: measured, given a workspace, run.
#pragma once

#include <cstddef>

#include "bindings/call.hpp"
#include "cuda/device.hpp"
#include "cuda/ops.hpp"

namespace nearfar {
namespace cuda_bindings {

#if defined(NEARFAR_EMULATE)
constexpr const char* kMemory = "CPU memory (this build emulates CUDA)";
inline bool on_device(const Array& a) { return a.on_cpu(); }
#else
constexpr const char* kMemory = "CUDA memory";
inline bool on_device(const Array& a) { return a.device_type == kDLCUDA || a.device_type == kDLCUDAManaged; }
#endif

/// The arrays of one call: of one device, checked as those of the CPU are.
class Call {
 public:
  Array input(py::handle obj, const char* name, int ndim, DTypes allowed = kFloats) {
    Array a = borrow(obj, name, allowed);
    add_batch(a, ndim);
    if (a.ndim != ndim)
      refuse_value(name, "expected " + std::to_string(ndim) + (ndim == 1 ? " dimension" : " dimensions") +
                             ", got shape " + shape_of(a));
    check_device(a, name);
    return a;
  }
  /// Points: of the dtype and depth of the first.
  Array points(py::handle obj, const char* name, int ndim, const Array& like) {
    Array a = input(obj, name, ndim);
    require_dtype(a, name, like.dtype);
    return a;
  }
  void* output(py::handle obj, const char* name, DType dtype, const int64_t* shape, int ndim) {
    Array a = borrow(obj, name, {dtype});
    add_batch(a, shape, ndim);
    if (a.ndim != ndim || text_of(a.shape, a.ndim) != text_of(shape, ndim))
      refuse_value(name, "expected shape " + text_of(shape, ndim) + ", got " + shape_of(a));
    check_device(a, name);
    if (a.readonly) refuse_value(name, "expected a writable array, got a read-only one");
    if (!a.contiguous()) refuse_value(name, "expected a C-contiguous array");
    return a.data;
  }
  template <class T>
  T* output(py::handle obj, const char* name, std::initializer_list<int64_t> shape) {
    constexpr DType dtype = std::is_same_v<T, int64_t> ? DType::i64 : sizeof(T) == 8 ? DType::f64 : DType::f32;
    return static_cast<T*>(output(obj, name, dtype, shape.begin(), static_cast<int>(shape.size())));
  }
  /// None is null, and nothing else is: an empty array has no address, but gradients of numbers are wanted with it.
  template <class T>
  T* gradient(py::handle obj, const char* name, const Array& like) {
    if (obj.is_none()) return nullptr;
    void* data = output(obj, name, sizeof(T) == 8 ? DType::f64 : DType::f32, like.shape, like.ndim);
    return data ? static_cast<T*>(data) : reinterpret_cast<T*>(alignof(std::max_align_t));
  }

  /// A number, or where `at` is then set, a 0-d float64 array on the device.
  double number(py::handle obj, const char* name, const double*& at) {
    if (py::isinstance<py::float_>(obj)) return obj.cast<double>();
    at = input(obj, name, 0, {DType::f64}).as<double>();
    return 0;
  }
  /// int64 labels of `count` things.
  const int64_t* labels(py::handle obj, const char* name, int64_t count) {
    const Array a = input(obj, name, 1, {DType::i64});
    require_shape(a, name, {count});
    if (!a.contiguous()) refuse_value(name, "expected contiguous labels");
    return a.as<int64_t>();
  }

  /// f(context): once to measure, once for real.
  template <class F>
  void run(const py::tuple& where, F f) const {
    void* stream = reinterpret_cast<void*>(where[0].cast<uintptr_t>());
    const bool exact = where[1].cast<bool>();
    const int64_t strip_bytes = where[2].cast<int64_t>();
    if (strip_bytes < 1) refuse_value("where", "expected a positive number of strip bytes");
    const cuda::OnDevice guard(device_);
    const cuda::Device device = cuda::device_of(device_);
    cuda::Context measure(nullptr, 0, stream, exact, strip_bytes, device);
    f(measure);
    Array workspace;
    if (measure.used() > 0) {
      workspace = borrow(where[3](measure.used()), "workspace", {DType::i64});
      check_device(workspace, "workspace");
      if (workspace.ndim != 1 || !workspace.contiguous() || workspace.shape[0] * 8 < measure.used())
        refuse_value("workspace", "expected " + std::to_string(measure.used()) + " contiguous bytes");
    }
    // A base that is not null, also of a call that needs no memory.
    cuda::Context c(workspace.data ? workspace.data : &workspace, measure.used(), stream, exact, strip_bytes, device);
    py::gil_scoped_release release;
    f(c);
  }

 private:
  void check_device(const Array& a, const char* name) {
    if (!a.data) return;  // an empty array
    if (!on_device(a)) refuse_value(name, std::string("expected ") + kMemory + ", got an array on " + device_of(a));
    if (device_ >= 0 && a.device_id != device_)
      refuse_value(name, "expected device cuda:" + std::to_string(device_) + ", got " + device_of(a));
    device_ = a.device_id;
  }
  void check_device(const Array& a, const char* name) const { const_cast<Call*>(this)->check_device(a, name); }
  int device_ = -1;
};

}  // namespace cuda_bindings
}  // namespace nearfar
