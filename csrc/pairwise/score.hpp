// Score: how one coordinate of a pair enters the accumulator of that pair. The first word of the vocabulary.
//
//   Dot                 s += x_k y_k
//   SquaredDifference   s += (x_k - y_k)^2
//   AbsoluteDifference  s += |x_k - y_k|
//   LargestDifference   s = max(s, |x_k - y_k|)
//   PowerDifference     s += |x_k - y_k|^p
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
