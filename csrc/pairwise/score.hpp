// Score: how one coordinate of a pair enters the accumulator of that pair. The first word of the vocabulary.
//
//   Dot                 s += x_k y_k
//   SquaredDifference   s += (x_k - y_k)^2
//   AbsoluteDifference  s += |x_k - y_k|
//
// A is a scalar that is broadcast (CPU: the tile side, GPU: either side), V the accumulator's type: a SIMD vector on
// the CPU, a float on the GPU. `absolute` is that of the backend.
#pragma once

#if defined(__CUDACC__)
#define NEARFAR_FN __host__ __device__ __forceinline__
#else
#define NEARFAR_FN inline __attribute__((always_inline))
#endif

namespace nearfar {
namespace {

struct Dot {
  template <class A, class V>
  static NEARFAR_FN void accumulate(V& s, A x, V y) {
    s += x * y;
  }
};

struct SquaredDifference {
  template <class A, class V>
  static NEARFAR_FN void accumulate(V& s, A x, V y) {
    const V difference = x - y;
    s += difference * difference;
  }
};

struct AbsoluteDifference {
  template <class A, class V>
  static NEARFAR_FN void accumulate(V& s, A x, V y) {
    s += absolute(V(x - y));
  }
};

}  // namespace
}  // namespace nearfar
