// Rows as the compute type: any strides, any floating dtype, brought to unit norm or shifted to a common centre while
// they are read. Everything downstream sees packed panels of T.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/ops.hpp"
#include "cpu/threads.hpp"
#include "cpu/vector.hpp"

namespace nearfar {
namespace {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

/// Sign, 5 bits of exponent, 10 of fraction. By hand: few compilers have the type, and none vectorises its conversion.
struct Float16 {
  uint16_t bits;
};
inline float widen(Float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (magnitude < 0x7c00 ? 112u << 23 : 224u << 23);  // or infinity, NaN
  // Not denormal bits times a power of two: tasks flush denormal numbers to zero.
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const float value = magnitude < 0x400 ? small : float_of(normal);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return float_of(bits | sign);
}

/// The upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};
inline float widen(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }

template <class T>
class Source {
 public:
  Source() = default;
  explicit Source(const Rows& rows) : rows_(rows) {}

  int64_t n() const { return rows_.n; }
  int64_t d() const { return rows_.d; }

  /// Divide row i by its norm; a zero row stays zero.
  void normalize(int threads) {
    Buffer<T> inverse(rows_.n);
    parallel_for(tasks(), threads, [&](int64_t task, int) {
      Buffer<T> row(rows_.d);
      for (int64_t i = task * kRowsPerTask; i < end(task); ++i) inverse[i] = inverse_of(view(i, row.get()));
    });
    inverse_norm_ = static_cast<Buffer<T>&&>(inverse);
  }
  /// The same for who reads every row by `get_new` first.
  void normalize_as_read() { inverse_norm_ = Buffer<T>(rows_.n); }

  /// Subtract `center` (d values, kept by the caller) from every packed row.
  void shift(const T* center) { center_ = center; }

  /// Rows are packed in this order (n indices, kept by the caller); where no packed rows are meant they go by their
  /// own.
  void arrange(const int32_t* order) { order_ = order; }
  /// The row that is packed at a place.
  int64_t row_at(int64_t place) const { return order_ ? order_[place] : place; }

  T inverse_norm(int64_t i) const { return inverse_norm_.get() ? inverse_norm_[i] : T(1); }
  bool normalized() const { return inverse_norm_.get() != nullptr; }

  /// Row i as given, converted to T. Not inlined: four loops, and many callers.
  __attribute__((noinline)) void read(int64_t i, T* out) const {
    switch (rows_.dtype) {
      case DType::f16:
        return copy<Float16>(i, out);
      case DType::bf16:
        return copy<BFloat16>(i, out);
      case DType::f64:
        return copy<double>(i, out);
      default:
        return copy<float>(i, out);
    }
  }

  /// Row i, normalised if asked for, not shifted: what a distance is defined on.
  void get(int64_t i, T* out) const {
    read(i, out);
    if (normalized()) scale(i, out);
  }
  void get_new(int64_t i, T* out) const {
    read(i, out);
    if (!normalized()) return;
    inverse_norm_[i] = inverse_of(out);
    scale(i, out);
  }

  /// The same without a copy where the memory holds just that; else `buffer` is filled.
  const T* view(int64_t i, T* buffer) const {
    if (rows_.dtype == kOwn && rows_.col_stride == 1 && !normalized())
      return static_cast<const T*>(rows_.data) + i * rows_.row_stride;
    get(i, buffer);
    return buffer;
  }

  /// Fetches row i into L2, ahead of its use.
  void prefetch(int64_t i) const {
    if (i >= rows_.n || rows_.col_stride != 1) return;
    const char* row = static_cast<const char*>(rows_.data) + i * rows_.row_stride * size_of(rows_.dtype);
    for (int64_t at = 0; at < rows_.d * size_of(rows_.dtype); at += 64) __builtin_prefetch(row + at, 0, 2);
  }

  /// The row at place i as it is packed: normalised, shifted.
  void get_packed(int64_t place, T* out) const {
    const int64_t i = row_at(place);
    if (!center_) return get(i, out);
    const T* own = view(i, out);
    for (int64_t k = 0; k < rows_.d; ++k) out[k] = own[k] - center_[k];
  }

  /// W rows from i0 on side by side, out[k][W], as `get` gives them. Rows shorter than a vector take longer to read one
  /// by one than all that follows. False where there are no W such rows in memory.
  template <int W>
  bool gather(int64_t i0, T* out) const {
    constexpr int L = kLanes<T>;
    if (rows_.d >= L || i0 + W > rows_.n || rows_.dtype != kOwn || center_ || order_) return false;
    for (int64_t k = 0; k < rows_.d; ++k)
      for (int v = 0; v < W; v += L) {
        const T* from = static_cast<const T*>(rows_.data) + (i0 + v) * rows_.row_stride + k * rows_.col_stride;
        Vec<T> lanes{};
#pragma GCC unroll 16
        for (int u = 0; u < L; ++u) lanes[u] = from[u * rows_.row_stride];
        store(out + k * W + v, normalized() ? lanes * load(inverse_norm_.get() + i0 + v) : lanes);
      }
    return true;
  }

  /// Four vectors of partial sums: at D = 128 each lane adds two products, so float32 keeps all its digits.
  static double dot(const T* a, const T* b, int64_t d) {
    constexpr int L = kLanes<T>;
    Vec<T> sum[4] = {};
    int64_t k = 0;
    for (; k + 4 * L <= d; k += 4 * L)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) sum[u] += load(a + k + u * L) * load(b + k + u * L);
    for (; k + L <= d; k += L) sum[0] += load(a + k) * load(b + k);
    double rest = 0;
    for (; k < d; ++k) rest += static_cast<double>(a[k]) * static_cast<double>(b[k]);
    return rest + static_cast<double>(hsum<T>((sum[0] + sum[1]) + (sum[2] + sum[3])));
  }

  static constexpr int64_t kRowsPerTask = 64;
  int64_t tasks() const { return (rows_.n + kRowsPerTask - 1) / kRowsPerTask; }
  int64_t end(int64_t task) const { return std::fmin(rows_.n, (task + 1) * kRowsPerTask); }

  double squared_norm(const T* row) const { return dot(row, row, rows_.d); }

  /// Squares leave the range of T long before norms do (1e-20 in float32): such rows are divided by their largest
  /// entry.
  double norm_of(const T* row) const {
    constexpr double kLeast = sizeof(T) == 8 ? 1e-250 : 1e-25, kMost = sizeof(T) == 8 ? 1e250 : 1e30;
    const double square = squared_norm(row);
    if (square > kLeast && square < kMost) return std::sqrt(square);
    double largest = 0, sum = 0;
    for (int64_t k = 0; k < rows_.d; ++k) {
      const double entry = std::fabs(static_cast<double>(row[k]));
      if (entry > largest) largest = entry;  // GCC 12 for Arm fails on a maximum by fmax
    }
    if (largest == 0 || std::isinf(largest)) return std::sqrt(square);
    for (int64_t k = 0; k < rows_.d; ++k) sum += (row[k] / largest) * (row[k] / largest);
    return largest * std::sqrt(sum);
  }

 private:
  T inverse_of(const T* row) const {
    const double norm = norm_of(row);
    return norm == 0 ? T(0) : static_cast<T>(1 / norm);
  }
  void scale(int64_t i, T* row) const {
    const T inverse = inverse_norm_[i];
    for (int64_t k = 0; k < rows_.d; ++k) row[k] *= inverse;
  }

  template <class S>
  void copy(int64_t i, T* out) const {
    const S* row = static_cast<const S*>(rows_.data) + i * rows_.row_stride;
    if (rows_.col_stride == 1) {
      for (int64_t k = 0; k < rows_.d; ++k) out[k] = static_cast<T>(widen(row[k]));
    } else {
      for (int64_t k = 0; k < rows_.d; ++k) out[k] = static_cast<T>(widen(row[k * rows_.col_stride]));
    }
  }

  static constexpr DType kOwn = sizeof(T) == 8 ? DType::f64 : DType::f32;

  Rows rows_;
  Buffer<T> inverse_norm_;
  const T* center_ = nullptr;
  const int32_t* order_ = nullptr;
};

/// From the gradient of the normalised row to the gradient of the row itself, in place: for u = x / |x|,
/// dx = (du - u <u, du>) / |x|. Returns <u, du>.
template <class T>
double normalize_backward(const Source<T>& source, int64_t i, const T* unit, T* grad) {
  const int64_t d = source.d();
  const double along = Source<T>::dot(unit, grad, d);
  if (source.normalized()) {
    const T scale = source.inverse_norm(i);
    for (int64_t k = 0; k < d; ++k) grad[k] = scale * (grad[k] - unit[k] * static_cast<T>(along));
  }
  return along;
}

/// The last step of a gradient by scores `scale` <x_i, .>: times scale, through the normalisation. `along` takes
/// <x_i, dx_i>, which sum to scale times the gradient of scale.
template <class T>
void finish_gradient(const Source<T>& source, double scale, int threads, T* grad, double* along = nullptr) {
  const int64_t d = source.d();
  parallel_for(source.tasks(), threads, [&](int64_t task, int) {
    Buffer<T> unit(d);
    for (int64_t i = task * Source<T>::kRowsPerTask; i < source.end(task); ++i) {
      T* g = grad + i * d;
      for (int64_t k = 0; k < d; ++k) g[k] *= static_cast<T>(scale);
      source.get(i, unit.get());
      const double a = normalize_backward(source, i, unit.get(), g);
      if (along) along[i] = a;
    }
  });
}

/// Of both sets (dy may be dx: of one). Returns the gradient of scale, sum_ij (dL/ds_ij) s_ij / scale: the sum of
/// <x_i, dx_i> over scale, where every score counts `counted` times.
template <class T>
double finish_gradients(const Source<T>& x, const Source<T>& y, double scale, double counted, int threads, T* dx,
                        T* dy) {
  Buffer<double> along(x.n());
  finish_gradient(x, scale, threads, dx, along.get());
  if (dy && dy != dx) finish_gradient(y, scale, threads, dy);
  double sum = 0;
  for (int64_t i = 0; i < x.n(); ++i) sum += along[i];
  return sum / (counted * scale);
}

}  // namespace
}  // namespace nearfar
