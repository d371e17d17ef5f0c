// Map: from the score of a pair to the quantity that is reduced, with its derivative beside it. The second word of the
// vocabulary.
//
// A map of the squared distance r = |x - y|^2 has kDistance = true; its derivative is stated as the pull
// 2 d map / d r, so that the gradient is   dx_i = sum_j g_ij pull_ij (x_i - y_j)   and a radial kernel is never
// differentiated through a square root; `score` is r again, from the value. A map of the dot product has kDistance =
// false and dx_i = sum_j g_ij pull_ij y_j. Both are given the value again, which the backward pass has at hand.
//
// `exp_flush`, `sqrt` and `select` are those of the backend: include cpu/vector.hpp (or the CUDA one) first.
#pragma once

#include "pairwise/pair_map.hpp"
#include "pairwise/score.hpp"

namespace nearfar {
namespace {

struct DotMap {
  static constexpr bool kDistance = false;
  template <class V>
  static NEARFAR_FN V value(V s) {
    return s;
  }
  template <class V>
  static NEARFAR_FN V pull(V) {
    return V{} + 1.0f;
  }
};

struct OneMinusDotMap {
  static constexpr bool kDistance = false;
  template <class V>
  static NEARFAR_FN V value(V s) {
    return 1.0f - s;
  }
  template <class V>
  static NEARFAR_FN V pull(V) {
    return V{} - 1.0f;
  }
};

struct SquaredEuclideanMap {
  static constexpr bool kDistance = true;
  template <class V>
  static NEARFAR_FN V value(V r) {
    return r;
  }
  template <class V>
  static NEARFAR_FN V pull(V) {
    return V{} + 2.0f;
  }
  template <class V>
  static NEARFAR_FN V score(V value) {
    return value;
  }
};

/// The subgradient at distance 0 is 0.
struct EuclideanMap {
  static constexpr bool kDistance = true;
  template <class V>
  static NEARFAR_FN V value(V r) {
    return sqrt(r);
  }
  template <class V>
  static NEARFAR_FN V pull(V value) {
    return select(value > V{}, 1.0f / value, V{});
  }
  template <class V>
  static NEARFAR_FN V score(V value) {
    return value * value;
  }
};

/// exp(-r / 2): the length scale is divided out of the points beforehand.
struct GaussianMap {
  static constexpr bool kDistance = true;
  template <class V>
  static NEARFAR_FN V value(V r) {
    return exp_flush(V(r * -0.5f));
  }
  template <class V>
  static NEARFAR_FN V pull(V value) {
    return -value;
  }
  template <class V>
  static NEARFAR_FN V score(V value) {
    return log(value) * -2.0f;
  }
};

/// The one switch from the name of a map to its type.
template <class F>
inline void with_map(PairMap name, F f) {
  switch (name) {
    case PairMap::dot:
      return f(DotMap{});
    case PairMap::one_minus_dot:
      return f(OneMinusDotMap{});
    case PairMap::sqeuclidean:
      return f(SquaredEuclideanMap{});
    case PairMap::euclidean:
      return f(EuclideanMap{});
    case PairMap::gaussian:
      return f(GaussianMap{});
  }
}

}  // namespace
}  // namespace nearfar
