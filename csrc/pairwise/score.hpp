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
// the CPU, a float on the GPU. `absolute`, `largest`, `exp`, `log` and `select` are those of the backend.
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

struct PowerDifference {
  double p;
  template <class A, class V>
  NEARFAR_FN void accumulate(V& s, A x, V y) const {
    s += power(absolute(V(x - y)), p);
  }
};

}  // namespace
}  // namespace nearfar
