// The names of the maps, for interfaces that must not pull in vector code. The maps themselves: map.hpp.
#pragma once

namespace nearfar {

/// What is computed from a pair, up to the reduction. Distances are Euclidean; cosine distance is one_minus_dot of unit
/// rows; gaussian is exp(-|x - y|^2 / 2).
enum class PairMap : int { dot, one_minus_dot, sqeuclidean, euclidean, gaussian };

}  // namespace nearfar
