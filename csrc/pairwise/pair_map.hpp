// The names of the maps, for interfaces that must not pull in vector code. The maps themselves: map.hpp.
#pragma once

namespace nearfar {

/// What is computed from a pair, up to the reduction. Distances are Euclidean; cosine distance is one_minus_dot of unit
/// rows; gaussian is exp(-|x - y|^2 / 2). The last three are of |x_k - y_k|: their sum, maximum, and sum of powers.
enum class PairMap : int { dot, one_minus_dot, sqeuclidean, euclidean, gaussian, cityblock, chebyshev, minkowski };

/// Metrics of the coordinates' absolute differences: their scores and gradients are not matrix products.
inline constexpr bool by_coordinate(PairMap map) {
  return map == PairMap::cityblock || map == PairMap::chebyshev || map == PairMap::minkowski;
}

}  // namespace nearfar
