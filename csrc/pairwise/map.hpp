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

/// d / dx_k of a metric of |x_k - y_k| is  g pull(x_k - y_k, g, aside(value)), summed over the pairs of x: what a pair
/// needs besides the difference is computed once, aside. 0 where the difference is 0.
struct CoordinateMap {
  static constexpr bool kDistance = false;
  template <class V>
  static NEARFAR_FN V signed_by(V difference, V value) {
    return select(difference > V{}, value, select(difference < V{}, V(-value), V{}));
  }
};

struct CityblockMap : CoordinateMap {
  AbsoluteDifference score;
  template <class V>
  static NEARFAR_FN V value(V s) {
    return s;
  }
  template <class V>
  static NEARFAR_FN V aside(V value) {
    return value;
  }
  template <class V>
  static NEARFAR_FN V pull(V difference, V grad, V) {
    return signed_by(difference, grad);
  }
};

/// Every coordinate that attains the maximum has the whole slope, as in torch.
struct ChebyshevMap : CoordinateMap {
  LargestDifference score;
  template <class V>
  static NEARFAR_FN V value(V s) {
    return s;
  }
  template <class V>
  static NEARFAR_FN V aside(V value) {
    return value;
  }
  template <class V>
  static NEARFAR_FN V pull(V difference, V grad, V value) {
    return signed_by(difference, V(select(absolute(difference) == value, grad, V{})));
  }
};

/// (|x_k - y_k| / value)^(p - 1), through logarithms: neither power overflows.
struct MinkowskiMap : CoordinateMap {
  PowerDifference score;
  template <class V>
  NEARFAR_FN V value(V s) const {
    return power(s, 1 / score.p);
  }
  template <class V>
  static NEARFAR_FN V aside(V value) {
    return log(value);
  }
  template <class V>
  NEARFAR_FN V pull(V difference, V grad, V log_value) const {
    const V slope = grad * exp(scaled(V(log(absolute(difference)) - log_value), score.p - 1));
    return signed_by(difference, V(select(log_value == log_value, slope, V{})));  // a NaN row is its own affair
  }
};

template <class F>
inline void with_coordinate_map(PairMap name, double p, F f) {
  if (name == PairMap::cityblock) return f(CityblockMap{});
  if (name == PairMap::chebyshev) return f(ChebyshevMap{});
  f(MinkowskiMap{{}, {p}});
}

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
    default:
      return;  // those of with_coordinate_map
  }
}

}  // namespace
}  // namespace nearfar
