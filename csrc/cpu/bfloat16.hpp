// Two bfloat16 numbers in a lane of 32 bits: a CPU with AVX512-BF16 multiplies and adds both in the time of one float32
// product. Products of such numbers are exact in float32 and sums are float32 ones, so scores of such rows lose
// nothing.
#pragma once

#include "cpu/vector.hpp"

namespace nearfar {
namespace {

/// Whether rows of bfloat16 numbers are multiplied two a lane.
#if defined(__AVX512BF16__)
template <class T>
constexpr bool kHalves = sizeof(T) == 4;
#else
template <class T>
constexpr bool kHalves = false;
#endif

/// Numbers that a lane of a score's operands holds.
template <class Score>
constexpr int kPerLane = 1;

/// s += x_k y_k + x_{k+1} y_{k+1}; lanes of x and y hold two bfloat16 numbers, whose bits pass through as those of a
/// float: loads and broadcasts only (`splat` subtracts 0, which compilers leave out).
struct HalvesDot {
  NEARFAR_INLINE static void accumulate(Vec<float>& s, Vec<float> x, Vec<float> y) {
#if defined(__AVX512BF16__) && !defined(NEARFAR_EMULATE_AVX512)
    s = _mm512_dpbf16_ps(s, (__m512bh)x, (__m512bh)y);
#else
    const auto low = [](Vec<float> v) { return (Vec<float>)((IVec<float>)v << 16); };
    const auto high = [](Vec<float> v) { return (Vec<float>)((IVec<float>)v >> 16 << 16); };
    s += high(x) * high(y);
    s += low(x) * low(y);
#endif
  }
};
template <>
constexpr int kPerLane<HalvesDot> = 2;

/// v rounded to a bfloat16 number, of two that are equally near to the larger; NaN stays NaN.
NEARFAR_INLINE Vec<float> to_bfloat16(Vec<float> v) { return (Vec<float>)(((IVec<float>)v + 0x8000) >> 16 << 16); }

/// Lane i holds a_i and b_i, which are bfloat16 numbers.
NEARFAR_INLINE Vec<float> side_by_side(Vec<float> a, Vec<float> b) {
  return (Vec<float>)(((IVec<float>)a >> 16 & 0xffff) | (IVec<float>)b);
}

/// The numbers of a, then those of b, which are bfloat16 numbers.
NEARFAR_INLINE Vec<float> in_sequence(Vec<float> a, Vec<float> b) {
#if defined(__AVX512BF16__) && !defined(NEARFAR_EMULATE_AVX512)
  return (Vec<float>)_mm512_cvtne2ps_pbh(b, a);
#else
  constexpr int L = kLanes<float>;
  uint16_t out[2 * L];
  for (int i = 0; i < L; ++i) {
    out[i] = static_cast<uint16_t>(((IVec<float>)a)[i] >> 16);
    out[L + i] = static_cast<uint16_t>(((IVec<float>)b)[i] >> 16);
  }
  Vec<float> result;
  std::memcpy(&result, out, sizeof result);
  return result;
#endif
}

}  // namespace
}  // namespace nearfar
