// Square blocks transposed in registers: what packing rows side by side is made of.
#pragma once

#include <utility>

#include "cpu/vector.hpp"

namespace nearfar {
namespace {

// The lanes I of a and b, one behind the other. GCC before 12 has no __builtin_shufflevector, Clang no other.
template <class T, int... I>
NEARFAR_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, IVec<T>{I...});
#endif
}

// Where lane i of a vector comes from when two are exchanged in blocks of STEP lanes.
template <int L, int STEP, int... I>
NEARFAR_INLINE constexpr auto low_lanes(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, ((I & STEP) ? L + I - STEP : I)...>{};
}
template <int L, int STEP, int... I>
NEARFAR_INLINE constexpr auto high_lanes(std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, ((I & STEP) ? L + I : I + STEP)...>{};
}

// Transposes kLanes vectors of kLanes lanes in place, by exchanging halves of ever smaller blocks.
template <class T, int STEP>
NEARFAR_INLINE void transpose_step(Vec<T> (&v)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  constexpr auto low = low_lanes<L, STEP>(std::make_integer_sequence<int, L>{});
  constexpr auto high = high_lanes<L, STEP>(std::make_integer_sequence<int, L>{});
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & STEP) continue;
    const Vec<T> a = v[i], b = v[i + STEP];
    v[i] = shuffle<T>(a, b, low);
    v[i + STEP] = shuffle<T>(a, b, high);
  }
  if constexpr (STEP > 1) transpose_step<T, STEP / 2>(v);
}

template <class T>
NEARFAR_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  transpose_step<T, kLanes<T> / 2>(v);
}

}  // namespace
}  // namespace nearfar
