// Map: from the score of a pair to the quantity that is reduced, with its derivative beside it. The second word of the
// vocabulary.
//
// A map of the squared distance r = |x - y|^2 has kDistance = true; its derivative is stated as the pull
// 2 d map / d r, so that the gradient is   dx_i = sum_j g_ij pull_ij (x_i - y_j)   and a radial kernel is never
// differentiated through a square root; `score` is r again, from the value. A map of the dot product has kDistance =
// false and dx_i = sum_j g_ij pull_ij y_j. Both are given the value again, which the backward pass has at hand.
//
// `exp_flush`, `expm1`, `log1p`, `sqrt`, `capped` and `select` are those of the backend: include cpu/vector.hpp (or the
// CUDA one) first.
#pragma once

#include <limits>

#include "pairwise/pair_map.hpp"
#include "pairwise/program.hpp"
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

/// d / dx_k of a metric of |x_k - y_k| is  pull(x_k, y_k, g, aside(value)), summed over the pairs of x: what a pair
/// needs besides the coordinates is computed once, aside. 0 where these are equal.
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
  static NEARFAR_FN V pull(V x, V y, V grad, V) {
    return signed_by(V(x - y), grad);
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
  static NEARFAR_FN V pull(V x, V y, V grad, V value) {
    const V difference = x - y;
    return signed_by(difference, V(select(absolute(difference) == value, grad, V{})));
  }
};

/// (|x_k - y_k| / value)^(p - 1), of the ratio or through logarithms: neither power overflows. A value may be 0 where
/// the coordinates differ, their powers being below the range of T: a pair of slope 0.
struct MinkowskiMap : CoordinateMap {
  PowerDifference score;
  explicit MinkowskiMap(double p) : score(p) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    return power(s, 1 / score.p);
  }
  template <class V>
  NEARFAR_FN V aside(V value) const {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    return score.halves ? V(select(value == V{}, V{}, V(1.0f / value)))
                        : V(select(value == V{}, V{} + kInfinity, V(log(value))));
  }
  template <class V>
  NEARFAR_FN V pull(V x, V y, V grad, V aside) const {
    const V difference = x - y, size = absolute(difference);
    const V part = score.halves ? score.by_products(V(size * aside), score.halves - 2)
                                : exp(scaled(V(log(size) - aside), score.p - 1));
    return signed_by(difference, V(select(aside == aside, V(grad * part), V{})));  // a NaN row is its own affair
  }
};

template <class F>
inline void with_coordinate_map(PairMap name, double p, F f) {
  if (name == PairMap::cityblock) return f(CityblockMap{});
  if (name == PairMap::chebyshev) return f(ChebyshevMap{});
  f(MinkowskiMap(p));
}

/// f(the score) where no matrix product gives it, else nothing.
template <class F>
inline void with_coordinate_score(ScoreKind kind, F f) {
  if (kind == ScoreKind::absolute) f(AbsoluteDifference{});
  if (kind == ScoreKind::chi_squared) f(ChiSquared{});
}

inline bool by_coordinates(ScoreKind kind) {
  bool is = false;
  with_coordinate_score(kind, [&](auto) { is = true; });
  return is;
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
    default:
      return;  // those of with_coordinate_map
  }
}

// ---- steps of a program --------------------------------------------------------------------------------------------
//
// value(s), and slope(s, value) = d value / d s beside it; by(p, s, value) = d value / d parameter p. s is the operand:
// for the radial kernels a squared distance (laplacian: an L1 distance) that the first parameter a multiplies, a being
// one over the squared length scale (laplacian, matern12: over the length scale). The pull of a squared distance is
// twice its slope, so none of them is differentiated through a square root; where the slope at distance 0 is infinite
// (matern12) it is 0.

/// A parameter as steps compute with it: finite, with room for the factors of a map. The kernel of a tiny length scale
/// is 1 at distance 0, not inf * 0.
template <class T, class P>
NEARFAR_FN T parameter_of(P p) {
  constexpr P kMost = static_cast<P>(std::numeric_limits<T>::max()) / 16;
  return static_cast<T>(p > kMost ? kMost : p < -kMost ? -kMost : p);
}

/// exp(-a s / 2)
template <class T>
struct GaussianStep {
  static constexpr int kParameters = 1;
  NEARFAR_FN explicit GaussianStep(const T* p) : half(p[0] * T(-0.5)) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    return exp_flush(V(s * half));
  }
  template <class V>
  NEARFAR_FN V slope(V, V value) const {
    return value * half;
  }
  template <class V>
  NEARFAR_FN V by(int, V s, V value) const {
    return s * value * T(-0.5);
  }
  T half;
};

/// exp(-b sqrt(s)): Matern of smoothness 1/2, of one over the length scale, whose square leaves the range of T sooner.
template <class T>
struct Matern12Step {
  static constexpr int kParameters = 1;
  NEARFAR_FN explicit Matern12Step(const T* p) : b(p[0]) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    return exp_flush(V(sqrt(s) * -b));
  }
  template <class V>
  NEARFAR_FN V slope(V s, V value) const {
    return select(s > V{}, value / sqrt(s), V{}) * (b * T(-0.5));
  }
  template <class V>
  NEARFAR_FN V by(int, V s, V value) const {
    return -sqrt(s) * value;
  }
  T b;
};

/// Matern of smoothness nu = TWICE / 2 with t = sqrt(TWICE a s): exp(-t) times 1 + t, 1 + t + t^2 / 3. Beyond kFar,
/// where exp(-t) is 0, t stays there: it may be infinite.
template <class T, int TWICE>
struct MaternStep {
  static constexpr int kParameters = 1;
  NEARFAR_FN explicit MaternStep(const T* p) : a(p[0]) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    const V t = root(s), e = exp_flush(V(-t));
    if constexpr (TWICE == 3) return e + t * e;
    return e + t * e * (t * T(1.0 / 3) + T(1));
  }
  template <class V>
  NEARFAR_FN V slope_over_a(V s) const {
    const V t = root(s), e = exp_flush(V(-t));
    if constexpr (TWICE == 3) return e * T(-1.5);
    return (e + t * e) * T(-5.0 / 6);
  }
  template <class V>
  NEARFAR_FN V slope(V s, V) const {
    return slope_over_a(s) * a;
  }
  template <class V>
  NEARFAR_FN V by(int, V s, V) const {
    return slope_over_a(s) * s;
  }
  template <class V>
  NEARFAR_FN V root(V s) const {
    constexpr T kFar = 1000;
    return capped(sqrt(V(s * (a * T(TWICE)))), kFar);
  }
  T a;
};

/// (1 + a s / (2 alpha))^-alpha. It falls so slowly that a small alpha feels an a beyond the range of T: `beyond` is
/// the logarithm of what a lacks. There 1 is nothing beside a s / (2 alpha), but at distance 0.
template <class T>
struct RationalQuadraticStep {
  static constexpr int kParameters = 3;
  NEARFAR_FN explicit RationalQuadraticStep(const T* p)
      : a(p[0]), alpha(p[1]), beyond(p[2]), factor(parameter_of<T>(a / (2 * alpha))) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    if (alpha == T(1) && beyond == T(0)) return T(1) / (s * factor + T(1));
    if (beyond == T(0)) return exp_flush(V(log1p(V(s * factor)) * -alpha));  // a compare saved
    return exp_flush(V((log1p(V(s * factor)) + lacking(s)) * -alpha));
  }
  template <class V>
  NEARFAR_FN V slope(V s, V value) const {
    return value * (a * T(-0.5)) / (s * factor + T(1));
  }
  template <class V>
  NEARFAR_FN V by(int p, V s, V value) const {
    if (p == 2) return beyond == T(0) ? V{} : select(s > V{}, V(value * -alpha), V{});
    const V z = s * factor, u = z / (z + T(1));
    if (p == 0) return value * s * T(-0.5) / (z + T(1));
    // u - log(1 + z) = u + log(1 - u): its series where that cancels.
    V series = u * T(1.0 / 9) + T(1.0 / 8);
#pragma GCC unroll 6
    for (int k = 7; k >= 2; --k) series = series * u + T(1) / T(k);
    return value * (select(u < T(kSeries), -series * u * u, u - log1p(z)) - lacking(s));
  }
  template <class V>
  NEARFAR_FN V lacking(V s) const {
    return select(s > V{}, V(V{} + beyond), V{});
  }
  static constexpr double kSeries = sizeof(T) == 8 ? 0.01 : 0.1;
  T a, alpha, beyond, factor;
};

/// exp(-a s)
template <class T>
struct LaplacianStep {
  static constexpr int kParameters = 1;
  NEARFAR_FN explicit LaplacianStep(const T* p) : a(p[0]) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    return exp_flush(V(s * -a));
  }
  template <class V>
  NEARFAR_FN V slope(V, V value) const {
    return value * -a;
  }
  template <class V>
  NEARFAR_FN V by(int, V s, V value) const {
    return -s * value;
  }
  T a;
};

/// a s + b
template <class T>
struct AffineStep {
  static constexpr int kParameters = 2;
  NEARFAR_FN explicit AffineStep(const T* p) : a(p[0]), b(p[1]) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    return s * a + b;
  }
  template <class V>
  NEARFAR_FN V slope(V, V) const {
    return V{} + a;
  }
  template <class V>
  NEARFAR_FN V by(int p, V s, V) const {
    return p == 0 ? s : V{} + T(1);
  }
  T a, b;
};

/// c s
template <class T>
struct ScaleStep {
  static constexpr int kParameters = 1;
  NEARFAR_FN explicit ScaleStep(const T* p) : c(p[0]) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    return s * c;
  }
  template <class V>
  NEARFAR_FN V slope(V, V) const {
    return V{} + c;
  }
  template <class V>
  NEARFAR_FN V by(int, V s, V) const {
    return s;
  }
  T c;
};

/// With e = exp(-2 |s|): +-(1 - e) / (1 + e), slope 4 e / (1 + e)^2.
template <class T>
struct TanhStep {
  static constexpr int kParameters = 0;
  NEARFAR_FN explicit TanhStep(const T*) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    const V less = expm1(V(select(s < V{}, s, -s) * T(2))), size = less / (less + T(2));
    return select(s < V{}, size, -size);
  }
  template <class V>
  NEARFAR_FN V slope(V s, V) const {
    const V e = exp_flush(V(select(s < V{}, s, -s) * T(2))), whole = e + T(1);
    return e * T(4) / (whole * whole);
  }
  template <class V>
  NEARFAR_FN V by(int, V, V) const {
    return V{};
  }
};

/// s^n, n >= 1
template <class T>
struct PowerStep {
  static constexpr int kParameters = 0;
  NEARFAR_FN explicit PowerStep(int n) : n(n) {}
  template <class V>
  NEARFAR_FN V value(V s) const {
    return whole_power(s, n);
  }
  template <class V>
  NEARFAR_FN V slope(V s, V) const {
    return whole_power(s, n - 1) * T(n);
  }
  template <class V>
  NEARFAR_FN V by(int, V, V) const {
    return V{};
  }
  int n;
};

/// The one switch from the kind of a step with one operand to its type; `parameters` are the step's own.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class T, class F>
NEARFAR_FN void with_step(const ProgramStep& step, const T* parameters, F f) {
  switch (step.kind) {
    case StepKind::gaussian:
      return f(GaussianStep<T>(parameters));
    case StepKind::matern12:
      return f(Matern12Step<T>(parameters));
    case StepKind::matern32:
      return f(MaternStep<T, 3>(parameters));
    case StepKind::matern52:
      return f(MaternStep<T, 5>(parameters));
    case StepKind::rational_quadratic:
      return f(RationalQuadraticStep<T>(parameters));
    case StepKind::laplacian:
      return f(LaplacianStep<T>(parameters));
    case StepKind::affine:
      return f(AffineStep<T>(parameters));
    case StepKind::tanh:
      return f(TanhStep<T>(parameters));
    case StepKind::power:
      return f(PowerStep<T>(step.right));
    case StepKind::scale:
      return f(ScaleStep<T>(parameters));
    case StepKind::add:
    case StepKind::multiply:
      return;  // two operands: not maps
  }
}

}  // namespace
}  // namespace nearfar
