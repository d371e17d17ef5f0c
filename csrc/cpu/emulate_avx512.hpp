// The instructions of AVX-512 that the kernels name, made of AVX2: a build with NEARFAR_EMULATE_AVX512=ON runs levels
// v4, v4_vnni and v4_bf16 on a CPU without them. It shows lanes, tile shapes, masks and screening of these levels to be
// right; the compiler takes everything else apart by itself. For tests only: several times slower than v3.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>

#define NEARFAR_EMULATED [[maybe_unused]] inline __attribute__((always_inline))

namespace nearfar {
namespace {
namespace emulated {

template <class V, class F>
NEARFAR_EMULATED V each_lane(V v, F f) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = f(i);
  return v;
}

/// Bit i is f(i).
template <class V, class F>
NEARFAR_EMULATED unsigned bits(V v, F f) {
  unsigned mask = 0;
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) mask |= static_cast<unsigned>(f(i)) << i;
  return mask;
}

/// An instruction of AVX2 on both halves.
template <class F>
NEARFAR_EMULATED __m512i halves(F f, __m512i a, __m512i b) {
  __m256i x[2], y[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  for (int i = 0; i < 2; ++i) x[i] = f(x[i], y[i]);
  std::memcpy(&a, x, sizeof a);
  return a;
}

// As the instructions: the second operand where either is NaN or both are zeros.
template <class V>
NEARFAR_EMULATED V max(unsigned, V a, V b) {
  return a > b ? a : b;
}
template <class V>
NEARFAR_EMULATED V min(unsigned, V a, V b) {
  return a < b ? a : b;
}
template <class V>
NEARFAR_EMULATED V sqrt(unsigned, V v) {
  return each_lane(v, [&](unsigned i) { return std::sqrt(v[i]); });
}

template <class T, class V>
NEARFAR_EMULATED void stream(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

template <class V>
NEARFAR_EMULATED unsigned not_less(V a, V b) {
  return bits(a, [&](unsigned i) { return !(a[i] < b[i]); });
}

/// v 2^n for whole numbers n, rounded once; 0 in lanes that are not kept.
template <class V>
NEARFAR_EMULATED V scalef(unsigned kept, V v, V n) {
  return each_lane(v, [&](unsigned i) -> decltype(v[0] + v[0]) {
    if (!(kept >> i & 1)) return 0;
    if (n[i] != n[i]) return n[i];
    return std::scalbn(v[i], static_cast<int>(n[i] < -5000 ? -5000 : n[i] > 5000 ? 5000 : n[i]));
  });
}

NEARFAR_EMULATED unsigned test(__m512i a, __m512i b) {
  return bits(a, [&](unsigned i) { return (a[i] & b[i]) != 0; });
}
template <class Int>
NEARFAR_EMULATED unsigned less(__m512i a, __m512i b) {
  typedef Int Lanes __attribute__((vector_size(64)));
  const Lanes x = (Lanes)a, y = (Lanes)b;
  return bits(x, [&](unsigned i) { return x[i] < y[i]; });
}

NEARFAR_EMULATED __m512i set(short value) {
  typedef short Lanes __attribute__((vector_size(64)));
  return (__m512i)(value - Lanes{});
}
NEARFAR_EMULATED __m512i add(__m512i a, __m512i b) {
  return halves([](__m256i x, __m256i y) { return _mm256_add_epi16(x, y); }, a, b);
}
NEARFAR_EMULATED __m512i multiply(__m512i a, __m512i b) {
  return halves([](__m256i x, __m256i y) { return _mm256_madd_epi16(x, y); }, a, b);
}
NEARFAR_EMULATED __m512i multiply_bytes(__m512i a, __m512i b) {
  return halves([](__m256i x, __m256i y) { return _mm256_maddubs_epi16(x, y); }, a, b);
}
/// sum + a0 b0 + a1 b1 + a2 b2 + a3 b3 of unsigned bytes of a and signed bytes of b, wrapping.
NEARFAR_EMULATED __m512i dot_bytes(__m512i sum, __m512i a, __m512i b) {
  typedef int32_t Lanes __attribute__((vector_size(64)));
  const Lanes x = (Lanes)a, y = (Lanes)b;
  Lanes result = (Lanes)sum;
  for (int shift = 0; shift < 32; shift += 8) result += (x >> shift & 0xff) * (y << (24 - shift) >> 24);
  return (__m512i)result;
}

}  // namespace emulated
}  // namespace
}  // namespace nearfar

#undef NEARFAR_EMULATED

#define __AVX512F__ 1
#define __AVX512BW__ 1
#if NEARFAR_EMULATE_AVX512 >= 2
#define __AVX512VNNI__ 1
#endif
#if NEARFAR_EMULATE_AVX512 >= 3
#define __AVX512BF16__ 1  // bfloat16.hpp has its instructions in plain code
#endif

#define _mm512_maskz_max_ps nearfar::emulated::max
#define _mm512_maskz_max_pd nearfar::emulated::max
#define _mm512_maskz_min_ps nearfar::emulated::min
#define _mm512_maskz_min_pd nearfar::emulated::min
#define _mm512_maskz_sqrt_ps nearfar::emulated::sqrt
#define _mm512_maskz_sqrt_pd nearfar::emulated::sqrt
#define _mm512_stream_ps nearfar::emulated::stream
#define _mm512_stream_pd nearfar::emulated::stream
#define _mm512_maskz_scalef_ps nearfar::emulated::scalef
#define _mm512_maskz_scalef_pd nearfar::emulated::scalef
#undef _mm512_cmp_ps_mask
#undef _mm512_cmp_pd_mask
#define _mm512_cmp_ps_mask(a, b, comparison) nearfar::emulated::not_less(a, b)
#define _mm512_cmp_pd_mask(a, b, comparison) nearfar::emulated::not_less(a, b)
#define _mm512_test_epi64_mask nearfar::emulated::test
#define _mm512_cmplt_epi32_mask nearfar::emulated::less<int32_t>
#define _mm512_cmplt_epi64_mask nearfar::emulated::less<int64_t>
#define _mm512_set1_epi16 nearfar::emulated::set
#define _mm512_add_epi16 nearfar::emulated::add
#define _mm512_madd_epi16 nearfar::emulated::multiply
#define _mm512_maddubs_epi16 nearfar::emulated::multiply_bytes
#define _mm512_dpbusd_epi32 nearfar::emulated::dot_bytes
