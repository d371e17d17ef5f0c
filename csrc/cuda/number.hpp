// Numbers on the device: storage types, conversions, and the functions that pairwise/map.hpp asks of a backend.
#pragma once

#include <cmath>

#include "cuda/portable.hpp"
#include "pairwise/dtype.hpp"

namespace nearfar {
inline namespace device {

NEARFAR_DEVICE float absolute(float x) { return fabsf(x); }
NEARFAR_DEVICE double absolute(double x) { return fabs(x); }
using std::sqrt;
template <class T>
NEARFAR_DEVICE T select(bool condition, T yes, T no) {
  return condition ? yes : no;
}
/// NaN comes through.
template <class T>
NEARFAR_DEVICE T capped(T v, T most) {
  return v > most ? most : v;
}
template <class T>
NEARFAR_DEVICE T scaled(T v, double p) {
  return v * static_cast<T>(p);
}
template <class T>
NEARFAR_DEVICE T power(T v, double p) {
  return v == 0 ? v : static_cast<T>(std::exp(scaled(static_cast<T>(std::log(v)), p)));
}

}  // namespace device
}  // namespace nearfar

#include "pairwise/score.hpp"  // after what its scores are made of

namespace nearfar {
inline namespace device {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

/// 16 bytes, which a thread reads or writes at once.
template <class E>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(E);
  E v[kSize];
};

NEARFAR_DEVICE float widen(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
NEARFAR_DEVICE float widen(F16 x) { return cuda::half_to_float(x.bits); }
NEARFAR_DEVICE float widen(float x) { return x; }
NEARFAR_DEVICE double widen(double x) { return x; }

/// To the nearest, ties to even.
template <class E, class T>
NEARFAR_DEVICE E narrow(T value) {
  return static_cast<E>(value);
}
template <>
NEARFAR_DEVICE BF16 narrow<BF16, float>(float value) {
  return {cuda::float_to_bfloat(value)};
}
template <>
NEARFAR_DEVICE F16 narrow<F16, float>(float value) {
  return {cuda::float_to_half(value)};
}

template <class T>
NEARFAR_DEVICE T infinity() {
  return static_cast<T>(HUGE_VAL);
}
template <class T>
NEARFAR_DEVICE T not_a_number() {
  return static_cast<T>(nan(""));
}

NEARFAR_DEVICE float exp_flush(float x) { return expf(x); }
NEARFAR_DEVICE double exp_flush(double x) { return exp(x); }
using std::exp;
using std::expm1;
using std::fma;
using std::log;
using std::log1p;
NEARFAR_DEVICE float largest(float a, float b) { return fmaxf(a, b); }
NEARFAR_DEVICE double largest(double a, double b) { return fmax(a, b); }
NEARFAR_DEVICE float smallest(float a, float b) { return fminf(a, b); }
NEARFAR_DEVICE double smallest(double a, double b) { return fmin(a, b); }

/// The power of two that takes numbers up to `most` below 2^order; 1 where there are none.
NEARFAR_DEVICE float power_below(double most, int order) {
  if (!(most > 0)) return 1;
  const int power = order - 1 - ilogb(most);
  return ldexpf(1.0f, power < -100 ? -100 : power > 100 ? 100 : power);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace device
}  // namespace nearfar
