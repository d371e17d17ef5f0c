// The loss of one triplet: hinge or softplus of the positive's distance over the negative's.
#pragma once

#include <cmath>

#include "pairwise/function.hpp"

namespace nearfar {
namespace {

template <class T>
struct Triplet {
  bool squared, soft;
  T margin;

  /// v of a squared distance; dv = pull (x_i - x_j), 0 at distance 0.
  NEARFAR_FN T value(T square) const { return squared ? square : std::sqrt(square); }
  NEARFAR_FN T square(T value) const { return squared ? value : value * value; }
  NEARFAR_FN T pull(T value) const { return squared ? T(2) : value > 0 ? 1 / value : T(0); }

  /// The loss and its slope along v_ap - v_an.
  NEARFAR_FN double loss(T positive, T negative, T& slope) const {
    const double gap = static_cast<double>(positive) - static_cast<double>(negative);
    if (!soft) {
      const double value = gap + static_cast<double>(margin);
      slope = value > 0;
      return value > 0 ? value : 0;
    }
    const double e = std::exp(-std::fabs(gap));
    slope = static_cast<T>((gap > 0 ? 1 : e) / (1 + e));
    return (gap > 0 ? gap : 0) + std::log1p(e);
  }
};

}  // namespace
}  // namespace nearfar
