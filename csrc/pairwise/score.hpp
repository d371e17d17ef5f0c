// Score: how one coordinate of a pair enters the accumulator of that pair. The first word of the vocabulary.
//
//   Dot                 s += x_k y_k
//   SquaredDifference   s += (x_k - y_k)^2
//   AbsoluteDifference  s += |x_k - y_k|
//   LargestDifference   s = max(s, |x_k - y_k|)
//   PowerDifference     s += |x_k - y_k|^p
//   ChiSquared          s += (x_k - y_k)^2 / (x_k + y_k)
//
// A is a scalar that is broadcast (CPU: the tile side, GPU: either side), V the accumulator's type: a SIMD vector on
// the CPU, a float on the GPU. `absolute`, `largest`, `exp`, `log`, `sqrt` and `select` are those of the backend.
#pragma once

#include "pairwise/function.hpp"

namespace nearfar {
namespace {

struct Dot {
  template <class A, class V>
  static NEARFAR_FN void accumulate(V& s, A x, V y) {
    s += x * y;
  }
};

struct SquaredDifference {
  template <class A, class V>
  static NEARFAR_FN void accumulate(V& s, A x, V y) {
    const V difference = x - y;
    s += difference * difference;
  }
};

struct AbsoluteDifference {
  template <class A, class V>
  static NEARFAR_FN void accumulate(V& s, A x, V y) {
    s += absolute(V(x - y));
  }
  /// Of the score, by x_k and by y_k; 0 where these are equal.
  template <class V>
  static NEARFAR_FN void slopes(V x, V y, V& by_x, V& by_y) {
    by_x = select(x > y, V{} + 1.0f, select(x < y, V{} - 1.0f, V{}));
    by_y = -by_x;
  }
};

/// Of numbers that are not negative; 0 where both are 0, and so are the slopes. No square overflows.
struct ChiSquared {
  template <class A, class V>
  static NEARFAR_FN void accumulate(V& s, A x, V y) {
    const V difference = x - y;
    s += difference * ratio(difference, V(x + y));
  }
  template <class V>
  static NEARFAR_FN void slopes(V x, V y, V& by_x, V& by_y) {
    const V r = ratio(V(x - y), V(x + y));
    by_x = r * (2.0f - r);
    by_y = -r * (2.0f + r);
  }

 private:
  template <class V>
  static NEARFAR_FN V ratio(V difference, V total) {
    return select(total == V{}, V{}, V(difference / total));
  }
};

/// A NaN stays.
struct LargestDifference {
  template <class A, class V>
  static NEARFAR_FN void accumulate(V& s, A x, V y) {
    const V difference = absolute(V(x - y));
    s = select(difference <= s, s, select(s != s, s, difference));
  }
};

/// v^n, n >= 0, by repeated squaring.
template <class V>
NEARFAR_FN V whole_power(V v, int n) {
  V result = V{} + 1.0f;
  for (; n > 0; n >>= 1, v *= v)
    if (n & 1) result *= v;
  return result;
}

struct PowerDifference {
  double p;
  int halves;  // 2 p where that is a whole number: products in place of logarithms, which take ten times as long; else
               // 0
  explicit PowerDifference(double p) : p(p), halves(p >= 1.5 && p <= 32 && 2 * p == int(2 * p) ? int(2 * p) : 0) {}
  /// v^(halves / 2), v >= 0
  template <class V>
  static NEARFAR_FN V by_products(V v, int halves) {
    return halves & 1 ? whole_power(V(sqrt(v)), halves) : whole_power(v, halves >> 1);
  }
  template <class A, class V>
  NEARFAR_FN void accumulate(V& s, A x, V y) const {
    const V difference = absolute(V(x - y));
    s += halves ? by_products(difference, halves) : power(difference, p);
  }
};

}  // namespace
}  // namespace nearfar
