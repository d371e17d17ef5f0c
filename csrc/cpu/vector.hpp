// One SIMD vector of the widest kind the instruction set has, and exp, log, expm1, log1p on it.
//
// Why not a library: kernel sources are compiled once per instruction set into one module, so nothing here may leave a
// weak symbol that the linker could hand to a machine without that instruction set. GCC/Clang vector extensions give
// + - * / and comparisons on any target as plain expressions; the few operations they lack are intrinsics below.
// csrc/README.md, "Vector layer", has the comparison with std::experimental::simd and Highway.
//
// Accuracy contract (tests/test_vector.py): exp, log within 2 ulp and expm1, log1p, softplus, sigmoid within 3 ulp,
// float and double, for every argument: overflow to inf, gradual underflow, denormal arguments, +-0, +-inf; NaN in
// gives NaN out in that lane. Needs -ffp-contract=fast at most, never -ffast-math: rounding by a magic number, NaN and
// -0 rely on IEEE semantics.
//
//   exp, expm1:  x = n ln2 + r, |r| <= ln2/2;  e^x = 2^n P(r)              P minimax (Sollya fpminimax)
//   log, log1p:  x = 2^k (1 + f), f in [sqrt(1/2) - 1, sqrt(2) - 1];       log x = k ln2 + log(1 + f)
//                log(1 + f) = f - f^2/2 + s (f^2/2 + s^2 Q(s^2)), s = f/(2 + f)       Q as in fdlibm
//
// Measured: largest error in ulp (float: exp at all 2^32 arguments, the others at every fifth, against double; double:
// 8e6 arguments against long double) and ns an element in L1 on one AVX-512 core at 3.9 GHz, GCC 12; std:: is
// glibc 2.36, a scalar call. exp in float is 14 micro-operations, 7.3 cycles for 16 lanes on two ports.
//
//             ulp, float      ulp, double     ns, float                     ns, double
//             v2     v3, v4   v2     v3, v4   v2     v3     v4     std::    v2     v3     v4     std::
//   exp       1.17   0.90    1.15   0.86     0.84   0.30   0.11   1.62      2.5    0.80   0.34   2.5
//   log       0.83   0.83    0.81   0.81     1.03   0.51   0.31   1.88      2.7    1.23   0.72   2.6
//   expm1     1.64   1.52    1.94   1.80     0.80   0.30   0.18   6.09      2.6    0.82   0.51   6.2
//   log1p     1.40   1.40    1.37   1.37     1.17   0.61   0.40   4.02      3.1    1.48   0.90   3.7
//   exp_flush 1.17   0.89    1.14   0.87     0.74   0.25   0.11   -         2.4    0.69   0.34   -
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(NEARFAR_EMULATE_AVX512)
#include "cpu/emulate_avx512.hpp"
#elif defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Always inlined, in an anonymous namespace: no symbol of its own in any object, and no call in a kernel's inner loop.
#define NEARFAR_INLINE [[maybe_unused]] inline __attribute__((always_inline))

namespace nearfar {
namespace {

// ---- types ----------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

// Specialised by hand: GCC drops vector_size from an alias template when the element type is dependent.
template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
  using Int = int32_t;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t UintVector __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VecTraits<double> {
  using Int = int64_t;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t IntVector __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t UintVector __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VecTraits<T>::Vector;
template <class T>
using IntOf = typename VecTraits<T>::Int;
template <class T>  // Also what a comparison gives: lanes of 0 or -1.
using IVec = typename VecTraits<T>::IntVector;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));

// ---- memory, constants, lane-wise choice ----------------------------------------------------------------------------

template <class T>
NEARFAR_INLINE Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
NEARFAR_INLINE void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

template <class T>
NEARFAR_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, -0 and NaN included; 0 + x is not.
}

template <class T>
NEARFAR_INLINE IVec<T> isplat(IntOf<T> i) {
  return i - IVec<T>{};
}

template <class T>
NEARFAR_INLINE IVec<T> iota() {
  IVec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

// mask ? a : b for any vector type, masks as comparisons give them.
template <class Mask, class V>
NEARFAR_INLINE V select(Mask mask, V a, V b) {
  return mask ? a : b;
}

// Without the bit of the sign; of a NaN too.
NEARFAR_INLINE Vec<float> absolute(Vec<float> v) { return (Vec<float>)((IVec<float>)v & 0x7fffffff); }
NEARFAR_INLINE Vec<double> absolute(Vec<double> v) { return (Vec<double>)((IVec<double>)v & 0x7fffffffffffffff); }

// a > b ? a : b and a < b ? a : b in each lane: a NaN in b comes through, a NaN in a does not. Intrinsics because GCC
// 12 makes a comparison and a blend of the expression when one side is a constant; maskz with a full mask (the same
// instruction) because its plain 512-bit ones warn of uninitialised use there (PR 105593).
#if defined(__AVX512F__)
NEARFAR_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(-1, a, b); }
NEARFAR_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return _mm512_maskz_min_ps(-1, a, b); }
NEARFAR_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return _mm512_maskz_max_pd(-1, a, b); }
NEARFAR_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return _mm512_maskz_min_pd(-1, a, b); }
#elif defined(__AVX2__)
NEARFAR_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
NEARFAR_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return _mm256_min_ps(a, b); }
NEARFAR_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
NEARFAR_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return _mm256_min_pd(a, b); }
#elif defined(__SSE2__)
NEARFAR_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) { return _mm_max_ps(a, b); }
NEARFAR_INLINE Vec<float> vmin(Vec<float> a, Vec<float> b) { return _mm_min_ps(a, b); }
NEARFAR_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return _mm_max_pd(a, b); }
NEARFAR_INLINE Vec<double> vmin(Vec<double> a, Vec<double> b) { return _mm_min_pd(a, b); }
#else
template <class V>
NEARFAR_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
NEARFAR_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
#endif

// At most `most`; a NaN comes through.
NEARFAR_INLINE Vec<float> capped(Vec<float> v, float most) { return vmin(splat<float>(most), v); }
NEARFAR_INLINE Vec<double> capped(Vec<double> v, double most) { return vmin(splat<double>(most), v); }

#if defined(__AVX512F__)
NEARFAR_INLINE Vec<float> sqrt(Vec<float> v) { return _mm512_maskz_sqrt_ps(-1, v); }
NEARFAR_INLINE Vec<double> sqrt(Vec<double> v) { return _mm512_maskz_sqrt_pd(-1, v); }
#elif defined(__AVX2__)
NEARFAR_INLINE Vec<float> sqrt(Vec<float> v) { return _mm256_sqrt_ps(v); }
NEARFAR_INLINE Vec<double> sqrt(Vec<double> v) { return _mm256_sqrt_pd(v); }
#elif defined(__SSE2__)
NEARFAR_INLINE Vec<float> sqrt(Vec<float> v) { return _mm_sqrt_ps(v); }
NEARFAR_INLINE Vec<double> sqrt(Vec<double> v) { return _mm_sqrt_pd(v); }
#elif defined(__aarch64__)
NEARFAR_INLINE Vec<float> sqrt(Vec<float> v) { return (Vec<float>)vsqrtq_f32((float32x4_t)v); }
NEARFAR_INLINE Vec<double> sqrt(Vec<double> v) { return (Vec<double>)vsqrtq_f64((float64x2_t)v); }
#else
template <class V>
NEARFAR_INLINE V sqrt(V v) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
}
#endif

// A store past the caches, for results that are larger than these; `to` is aligned to a vector. Follow with fence().
#if defined(__AVX512F__)
NEARFAR_INLINE void stream(float* to, Vec<float> v) { _mm512_stream_ps(to, v); }
NEARFAR_INLINE void stream(double* to, Vec<double> v) { _mm512_stream_pd(to, v); }
#elif defined(__AVX2__)
NEARFAR_INLINE void stream(float* to, Vec<float> v) { _mm256_stream_ps(to, v); }
NEARFAR_INLINE void stream(double* to, Vec<double> v) { _mm256_stream_pd(to, v); }
#elif defined(__SSE2__)
NEARFAR_INLINE void stream(float* to, Vec<float> v) { _mm_stream_ps(to, v); }
NEARFAR_INLINE void stream(double* to, Vec<double> v) { _mm_stream_pd(to, v); }
#else
template <class T, class V>
NEARFAR_INLINE void stream(T* to, V v) {
  store<T>(to, v);
}
#endif
NEARFAR_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class V>
NEARFAR_INLINE auto is_nan(V v) {
  return v != v;
}

// Whether a mask (a comparison, or masks joined by & and |) is set in any lane.
template <class Mask>
NEARFAR_INLINE bool any(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#elif defined(__aarch64__)
  return vmaxvq_u32((uint32x4_t)mask) != 0;
#else
  int64_t part[sizeof mask / 8], all = 0;
  std::memcpy(part, &mask, sizeof mask);
  for (int64_t p : part) all |= p;
  return all != 0;
#endif
}

// The lanes of a mask that are set: bit i for lane i. A mask is whatever integers of a lane's size a comparison gives,
// which for doubles is `long` of one compiler and `long long` of another.
template <class Mask>
NEARFAR_INLINE unsigned lanes_set(Mask m) {
  [[maybe_unused]] constexpr bool kSingle = sizeof m[0] == 4;
#if defined(__AVX512F__)
  if constexpr (kSingle) return _mm512_cmplt_epi32_mask((__m512i)m, __m512i{});
  return _mm512_cmplt_epi64_mask((__m512i)m, __m512i{});
#elif defined(__AVX2__)
  if constexpr (kSingle) return static_cast<unsigned>(_mm256_movemask_ps((__m256)m));
  return static_cast<unsigned>(_mm256_movemask_pd((__m256d)m));
#elif defined(__SSE2__)
  if constexpr (kSingle) return static_cast<unsigned>(_mm_movemask_ps((__m128)m));
  return static_cast<unsigned>(_mm_movemask_pd((__m128d)m));
#elif defined(__aarch64__)
  if constexpr (kSingle) return vaddvq_u32((uint32x4_t)m & uint32x4_t{1, 2, 4, 8});
  return static_cast<unsigned>(vaddvq_u64((uint64x2_t)m & uint64x2_t{1, 2}));
#else
  unsigned bits = 0;
  for (unsigned i = 0; i < sizeof m / sizeof m[0]; ++i) bits |= static_cast<unsigned>(m[i] & 1) << i;
  return bits;
#endif
}

// ---- across lanes: a fixed binary tree, lane i with lane i + lanes/2 first ------------------------------------------

// Lane i becomes lane i ^ s.
template <int s, class V>
NEARFAR_INLINE V exchange(V v) {
  constexpr int n = sizeof(V) / sizeof(v[0]);
  if constexpr (n == 2) {
    return V{v[0 ^ s], v[1 ^ s]};
  } else if constexpr (n == 4) {
    return V{v[0 ^ s], v[1 ^ s], v[2 ^ s], v[3 ^ s]};
  } else if constexpr (n == 8) {
    return V{v[0 ^ s], v[1 ^ s], v[2 ^ s], v[3 ^ s], v[4 ^ s], v[5 ^ s], v[6 ^ s], v[7 ^ s]};
  } else {
    return V{v[0 ^ s], v[1 ^ s], v[2 ^ s],  v[3 ^ s],  v[4 ^ s],  v[5 ^ s],  v[6 ^ s],  v[7 ^ s],
             v[8 ^ s], v[9 ^ s], v[10 ^ s], v[11 ^ s], v[12 ^ s], v[13 ^ s], v[14 ^ s], v[15 ^ s]};
  }
}

template <class T>
NEARFAR_INLINE T hsum(Vec<T> v) {
  if constexpr (kLanes < T >> 8) v += exchange<8>(v);
  if constexpr (kLanes < T >> 4) v += exchange<4>(v);
  if constexpr (kLanes < T >> 2) v += exchange<2>(v);
  return v[0] + v[1];
}

template <class T>
NEARFAR_INLINE T hmax(Vec<T> v) {
  if constexpr (kLanes < T >> 8) v = vmax(v, exchange<8>(v));
  if constexpr (kLanes < T >> 4) v = vmax(v, exchange<4>(v));
  if constexpr (kLanes < T >> 2) v = vmax(v, exchange<2>(v));
  return vmax(v, exchange<1>(v))[0];  // no branch: nothing could foresee it
}

// ---- exp, log, expm1, log1p -----------------------------------------------------------------------------------------

template <class T>
struct MathTraits;

template <>
struct MathTraits<float> {
  static constexpr int mantissa = 23, bias = 127, to_normal_log2 = 24;
  static constexpr float magic = 0x1.8p23f;  // The low bits of x + magic are the integer nearest to x.
  static constexpr float log2e = 0x1.715476p0f, ln2_hi = 0x1.62e4p-1f, ln2_lo = 0x1.7f7d1cp-20f;  // n * ln2_hi is exact
  static constexpr float exp_zero = -103.97208f, exp_flush = -86.643394f;  // Below -150 ln2 e^x rounds to 0; -125 ln2.
  static constexpr float exp_inf = 89;                                     // Any number above ln(FLT_MAX) = 88.7.
  static constexpr float expm1_min = -20, expm1_linear = 0x1p-30f;         // expm1 is -1 below, x where |x| is smaller.
  static constexpr float smallest_normal = 0x1p-126f, to_normal = 0x1p24f;
  static constexpr int32_t sqrt_half = 0x3f3504f3, one = 0x3f800000;
  static constexpr float infinity = __builtin_inff(), nan = __builtin_nanf("");
  // P = 1 + r + r^2 p(r), relative error 2^-28; degree 5 would save one FMA in 14 and leave 2^-23.4.
  static constexpr float exp_p[] = {0x1.694ac4p-10f, 0x1.12398ep-7f, 0x1.555a28p-5f, 0x1.555492p-3f, 0x1.fffffap-2f};
  static constexpr float expm1_p[] = {0x1.6b737cp-10f, 0x1.1227a2p-7f, 0x1.555716p-5f, 0x1.5554bp-3f, 0x1.fffffep-2f};
  static constexpr float log_q[] = {0x1.f13c4cp-3f, 0x1.23d3dcp-2f, 0x1.999c26p-2f, 0x1.555554p-1f};
};

template <>
struct MathTraits<double> {
  static constexpr int mantissa = 52, bias = 1023, to_normal_log2 = 54;
  static constexpr double magic = 0x1.8p52;
  static constexpr double log2e = 0x1.71547652b82fep0, ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33;
  static constexpr double exp_zero = -745.1332191019412, exp_flush = -707.7032713517041, exp_inf = 710;
  static constexpr double expm1_min = -40, expm1_linear = 0x1p-60;
  static constexpr double smallest_normal = 0x1p-1022, to_normal = 0x1p54;
  static constexpr int64_t sqrt_half = 0x3fe6a09e667f3bcd, one = 0x3ff0000000000000;
  static constexpr double infinity = __builtin_inf(), nan = __builtin_nan("");
  // clang-format off
  static constexpr double exp_p[] = {
      0x1.ad900f767f2b1p-26, 0x1.28ae1ad6175d4p-22, 0x1.71df1b0872664p-19, 0x1.a0199942cc2e3p-16, 0x1.a01a012edb8a1p-13,
      0x1.6c16c1847f532p-10, 0x1.1111111126ecbp-7,  0x1.55555555506a4p-5,  0x1.55555555554fdp-3,  0x1.000000000000ap-1};
  static constexpr double expm1_p[] = {
      0x1.1f1a3e11c8c87p-29, 0x1.af5f369fe3902p-26, 0x1.27e51337f62c1p-22, 0x1.71ddf80ab4ad9p-19, 0x1.a01a018e0ed1fp-16,
      0x1.a01a01b004d5p-13,  0x1.6c16c16c1abp-10,   0x1.111111110f653p-7,  0x1.555555555554dp-5,  0x1.5555555555559p-3,
      0x1p-1};
  static constexpr double log_q[] = {
      0x1.2f112df3e5244p-3, 0x1.39a09d078c69fp-3, 0x1.7466496cb03dep-3, 0x1.c71c51d8e78afp-3, 0x1.2492494229359p-2,
      0x1.999999997fa04p-2, 0x1.5555555555593p-1};
  // clang-format on
};

// Horner, highest coefficient first. Estrin's shorter chain costs instructions, and kernels have many vectors in
// flight.
template <class V, class T, int n>
NEARFAR_INLINE V polynomial(V x, const T (&c)[n]) {
  V sum = splat<T>(c[0]);
#pragma GCC unroll 16
  for (int i = 1; i < n; ++i) sum = sum * x + c[i];
  return sum;
}

// x = n ln2 + r; `rounded` is n + magic, whose low bits are the integer n.
template <class T>
NEARFAR_INLINE Vec<T> reduce_by_ln2(Vec<T> x, Vec<T>& rounded, Vec<T>& n) {
  using M = MathTraits<T>;
  rounded = x * M::log2e + M::magic;
  n = rounded - M::magic;
  return (x - n * M::ln2_hi) - n * M::ln2_lo;
}

// 2^(n - 1), which is finite wherever 2^n e^r is.
template <class T>
NEARFAR_INLINE Vec<T> half_power(Vec<T> rounded) {
  using U = typename VecTraits<T>::UintVector;
  return (Vec<T>)(((U)rounded + (MathTraits<T>::bias - 1)) << MathTraits<T>::mantissa);
}

template <class T, bool kFlush>
NEARFAR_INLINE Vec<T> exp_of(Vec<T> x) {
  using M = MathTraits<T>;
  const Vec<T> lowest = splat<T>(kFlush ? M::exp_flush : M::exp_zero);
  // The operand that may be NaN comes second in vmin and vmax. Lanes below `lowest` are masked to 0 rather than left to
  // underflow: an underflowing multiplication costs a microcode assist, and softmax at low temperature is full of them.
  x = vmin(splat<T>(M::exp_inf), x);
  Vec<T> rounded, n;
#if defined(__AVX512F__)
  const Vec<T> r = reduce_by_ln2<T>(x, rounded, n);
  const Vec<T> p = (polynomial(r, M::exp_p) * r + T(1)) * r + T(1);
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, lowest, _CMP_NLT_UQ), p, n);
  } else {
    return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(x, lowest, _CMP_NLT_UQ), p, n);
  }
#else
  using U = typename VecTraits<T>::UintVector;
  const U is_zero = (U)(x < lowest);
  const Vec<T> r = reduce_by_ln2<T>(vmax(lowest, x), rounded, n);
  const Vec<T> p = (polynomial(r, M::exp_p) * r + T(1)) * r + T(1);
  if constexpr (kFlush) {
    const Vec<T> half = p * (Vec<T>)((U)half_power<T>(rounded) & ~is_zero);
    return half + half;
  } else {
    // 2^n in two factors, so that both are normal and only the last product is denormal. Adding n/2 to the exponent
    // bits of p would save a multiplication and lose a NaN.
    const U half = (U)rounded >> 1, rest = (U)rounded - half;
    const U first = (half << M::mantissa) + M::one, second = (rest << M::mantissa) + M::one;
    return p * (Vec<T>)first * (Vec<T>)(second & ~is_zero);
  }
#endif
}

template <class T>
NEARFAR_INLINE Vec<T> expm1_of(Vec<T> x) {
  using M = MathTraits<T>;
  Vec<T> rounded, n;
  const Vec<T> clamped = vmin(splat<T>(M::exp_inf), vmax(splat<T>(M::expm1_min), x));
  const Vec<T> r = reduce_by_ln2<T>(clamped, rounded, n);
  const Vec<T> p = polynomial(r, M::expm1_p) * (r * r) + r;
  const Vec<T> half_scale = half_power<T>(rounded);
  const Vec<T> half = half_scale * p + (half_scale - T(0.5));
  const Vec<T> magnitude = vmax(x, -x);
  return select(magnitude < M::expm1_linear, x, half + half);  // x itself also keeps -0.
}

// k ln2 + log(1 + f), |f| < 0.42.
template <class T>
NEARFAR_INLINE Vec<T> log_of_parts(Vec<T> k, Vec<T> f) {
  using M = MathTraits<T>;
  const Vec<T> s = f / (f + T(2)), z = s * s, half_square = f * f * T(0.5);
  const Vec<T> rest = s * (polynomial(z, M::log_q) * z + half_square);
  return (k * M::ln2_lo + rest) - half_square + f + k * M::ln2_hi;
}

// The exponent of a positive normal x that leaves x / 2^k in [sqrt(1/2), sqrt(2)).
template <class T>
NEARFAR_INLINE IVec<T> exponent(Vec<T> x) {
  return ((IVec<T>)x - MathTraits<T>::sqrt_half) >> MathTraits<T>::mantissa;
}

template <class T>
NEARFAR_INLINE Vec<T> to_float(IVec<T> i) {  // |i| < 2^(mantissa - 1). AVX2 has no conversion from int64.
  return (Vec<T>)(i + (IVec<T>)splat<T>(MathTraits<T>::magic)) - MathTraits<T>::magic;
}

template <class T>
NEARFAR_INLINE Vec<T> log_of(Vec<T> x) {
  using M = MathTraits<T>;
  const IVec<T> denormal = x < M::smallest_normal;
  const Vec<T> scaled = select(denormal, x * M::to_normal, x);
  const IVec<T> k = exponent<T>(scaled);
  const Vec<T> f = (Vec<T>)((IVec<T>)scaled - (k << M::mantissa)) - T(1);
  const Vec<T> y = log_of_parts<T>(to_float<T>(k - (denormal & M::to_normal_log2)), f);
  const Vec<T> edge = select(x == T(0), splat<T>(-M::infinity), select(x < T(0), splat<T>(M::nan), x));
  return select((x > T(0)) & (x < M::infinity), y, edge);
}

template <class T>
NEARFAR_INLINE Vec<T> log1p_of(Vec<T> x) {
  using M = MathTraits<T>;
  // u + c is 1 + x exactly (Knuth's two-sum); both are divided by 2^k, so that for k = 0 the f below is x itself.
  const Vec<T> u = x + T(1), u_minus_1 = u - T(1);
  const Vec<T> c = (T(1) - (u - u_minus_1)) + (x - u_minus_1);
  const IVec<T> k = exponent<T>(u);
  const IVec<T> shift = select(k < M::mantissa + 2, k, isplat<T>(M::mantissa + 2));  // c no longer matters there.
  const Vec<T> scale = (Vec<T>)(M::one - (shift << M::mantissa));
  const Vec<T> f = c * scale + ((Vec<T>)((IVec<T>)u - (k << M::mantissa)) - T(1));
  const Vec<T> y = log_of_parts<T>(to_float<T>(k), f);
  const Vec<T> edge = select(x == T(-1), splat<T>(-M::infinity), select(x < T(-1), splat<T>(M::nan), x));
  return select((x > T(-1)) & (x < M::infinity) & (x != T(0)), y, edge);
}

template <class T>
struct SoftplusSigmoid {
  Vec<T> softplus, sigmoid;
};

// log(1 + e^x) and its derivative from one exponential, e = exp(-|x|) in [0, 1]; flushed to 0 as exp_flush is.
template <class T>
NEARFAR_INLINE SoftplusSigmoid<T> softplus_sigmoid_of(Vec<T> x) {
  const Vec<T> e = exp_of<T, true>(vmin(x, -x)), one = splat<T>(T(1));
  const IVec<T> high = e > T(0.41421356237309503);  // 1 + e = 2 (1 + f) there, else 1 + f
  const Vec<T> f = select(high, (e - T(1)) * T(0.5), e);
  const Vec<T> log1p = log_of_parts<T>(select(high, one, Vec<T>{}), f);
  return {vmax(Vec<T>{}, x) + log1p, select(x < T(0), e, one) / (one + e)};
}

NEARFAR_INLINE Vec<float> exp(Vec<float> x) { return exp_of<float, false>(x); }
NEARFAR_INLINE Vec<double> exp(Vec<double> x) { return exp_of<double, false>(x); }

// exp with results below 2^-125 (double: 2^-1021) flushed to 0: the exp for weights. exp of -95 takes a microcode
// assist a vector (11 cycles a lane instead of 0.3), and then each FMA with such a weight takes one too (96 cycles
// instead of 0.45); with tau = 0.01 that is where the negatives of a contrastive loss lie. Cheaper than exp below
// AVX-512.
NEARFAR_INLINE Vec<float> exp_flush(Vec<float> x) { return exp_of<float, true>(x); }
NEARFAR_INLINE Vec<double> exp_flush(Vec<double> x) { return exp_of<double, true>(x); }

NEARFAR_INLINE Vec<float> log(Vec<float> x) { return log_of<float>(x); }
NEARFAR_INLINE Vec<double> log(Vec<double> x) { return log_of<double>(x); }
// v * p for a number p of double precision, and v^p for v >= 0, 0^p = 0.
template <class V>
NEARFAR_INLINE V scaled(V v, double p) {
  return v * static_cast<std::remove_reference_t<decltype(v[0])>>(p);
}
template <class V>
NEARFAR_INLINE V power(V v, double p) {
  return select(v == V{}, v, V(exp(scaled(V(log(v)), p))));
}

NEARFAR_INLINE Vec<float> expm1(Vec<float> x) { return expm1_of<float>(x); }
NEARFAR_INLINE Vec<double> expm1(Vec<double> x) { return expm1_of<double>(x); }
NEARFAR_INLINE Vec<float> log1p(Vec<float> x) { return log1p_of<float>(x); }
NEARFAR_INLINE Vec<double> log1p(Vec<double> x) { return log1p_of<double>(x); }
NEARFAR_INLINE SoftplusSigmoid<float> softplus_sigmoid(Vec<float> x) { return softplus_sigmoid_of<float>(x); }
NEARFAR_INLINE SoftplusSigmoid<double> softplus_sigmoid(Vec<double> x) { return softplus_sigmoid_of<double>(x); }

}  // namespace
}  // namespace nearfar
