// The names of the maps, for interfaces that must not pull in vector code. The maps themselves: map.hpp.
#pragma once

namespace nearfar {

/// What is computed from a pair, up to the reduction. Distances are Euclidean; cosine distance is one_minus_dot of unit
/// rows. The last three are of |x_k - y_k|: their sum, maximum, and sum of powers.
enum class PairMap : int { dot, one_minus_dot, sqeuclidean, euclidean, cityblock, chebyshev, minkowski };

/// Metrics of the coordinates' absolute differences: their scores and gradients are not matrix products.
inline constexpr bool by_coordinate(PairMap map) {
  return map == PairMap::cityblock || map == PairMap::chebyshev || map == PairMap::minkowski;
}

}  // namespace nearfar
