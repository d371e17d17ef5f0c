// Multiply by plain multiply-adds, or accumulate another score: true float32 and float64. 16 x 16 threads, R x R
// accumulators each.
#pragma once

#include "cuda/tile.hpp"

namespace nearfar {
inline namespace device {

template <class Score, class T_, int TILE>
struct Simt {
  using T = T_;
  Score score{};

  static constexpr int kM = TILE, kN = TILE, kDepth = 16;
  static constexpr int kRows = TILE / 16, kCols = TILE / 16;
  static constexpr int kResident = 2;  // while one waits, the other multiplies
  static constexpr int kRowLanes = 16, kWarpsM = cuda::kWarps, kWarpsN = 1;
  static constexpr int kPitch = TILE + 4;
  static_assert(TILE % 64 == 0 && kRows == kCols, "each thread takes groups of four");

  struct Memory {
    alignas(16) T a[kDepth][kPitch], b[kDepth][kPitch];
  };
  struct Accumulators {
    T v[kRows][kCols];
  };

  // Groups of four neighbours, 64 apart.
  NEARFAR_DEVICE static int spread(int group, int a) { return 4 * group + a % 4 + a / 4 * 64; }
  NEARFAR_DEVICE static int row(int a) { return spread(cuda::thread_index() / 16, a); }
  NEARFAR_DEVICE static int col(int b) { return spread(cuda::thread_index() % 16, b); }
  NEARFAR_DEVICE static int warp_m() { return cuda::warp_index(); }
  NEARFAR_DEVICE static int warp_n() { return 0; }
  NEARFAR_DEVICE static T& value(Accumulators& acc, int a, int b) { return acc.v[a][b]; }
  NEARFAR_DEVICE static void clear(Accumulators& acc) {
    NEARFAR_UNROLL
    for (int a = 0; a < kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < kCols; ++b) acc.v[a][b] = 0;
  }

  template <class A, class B>
  NEARFAR_DEVICE static void put(Memory& memory, const Stage<A, kM, kDepth>& stage_a,
                                 const Stage<B, kN, kDepth>& stage_b, const A& a, const B& b, int64_t k0) {
    put_one<A>(memory.a, stage_a, a, k0);
    put_one<B>(memory.b, stage_b, b, k0);
  }
  template <class Op, class StageOf>
  NEARFAR_DEVICE static void put_one(T (&to)[kDepth][kPitch], const StageOf& stage, const Op& op, int64_t k0) {
    stage.store(op, k0, [&](int row, int k, const Vector<typename Op::Element>& vector, const float* factor) {
      NEARFAR_UNROLL
      for (int u = 0; u < vector.kSize; ++u) {
        T x = static_cast<T>(widen(vector.v[u]));
        if (factor) x *= static_cast<T>(factor[Op::kContiguous ? u : 0]);
        (Op::kContiguous ? to[k + u][row] : to[k][row + u]) = x;
      }
    });
  }
  NEARFAR_DEVICE static void read(const T* from, T (&to)[kRows]) {
    constexpr int kSize = Vector<T>::kSize;
    NEARFAR_UNROLL
    for (int a = 0; a < kRows; a += kSize)
      *reinterpret_cast<Vector<T>*>(to + a) = *reinterpret_cast<const Vector<T>*>(from + spread(0, a));
  }
  template <class A, class B>
  NEARFAR_DEVICE void step(const Memory& memory, Accumulators& acc) const {
    if constexpr (std::is_same_v<Score, PowerDifference>) {  // long code, once
      NEARFAR_ROLLED
      for (int k = 0; k < kDepth; ++k) accumulate(memory, k, acc);
    } else {
      NEARFAR_UNROLL
      for (int k = 0; k < kDepth; ++k) accumulate(memory, k, acc);
    }
  }
  NEARFAR_DEVICE void accumulate(const Memory& memory, int k, Accumulators& acc) const {
    alignas(16) T x[kRows], y[kCols];
    read(memory.a[k] + row(0), x);
    read(memory.b[k] + col(0), y);
    NEARFAR_UNROLL
    for (int a = 0; a < kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < kCols; ++b) score.accumulate(acc.v[a][b], x[a], y[b]);
  }
};

}  // namespace device
}  // namespace nearfar
