// Multiply on the tensor cores by mma.sync, float32 accumulators. 2 x 4 warps.
//
// PIECES = 2 splits every element of A into a rounded part and the rounded rest, so that weights keep twice the digits
// of the operand type (bfloat16: 16, tf32: 22 bits): the products of a gradient, whose other operand is exact.
#pragma once

#include "cuda/tile.hpp"

namespace nearfar {
inline namespace device {

/// What a fragment is read from and how wide a step is.
template <class E>
struct MmaType;
template <>
struct MmaType<BF16> {
  using Kind = cuda::KindBF16;
  using Cell = uint16_t;
  static constexpr int kDepth = 16;
  NEARFAR_DEVICE static Cell cell(float x) { return narrow<BF16>(x).bits; }
  NEARFAR_DEVICE static float back(Cell cell) { return widen(BF16{cell}); }
};
template <>
struct MmaType<F16> {
  using Kind = cuda::KindF16;
  using Cell = uint16_t;
  static constexpr int kDepth = 16;
  NEARFAR_DEVICE static Cell cell(float x) { return narrow<F16>(x).bits; }
  NEARFAR_DEVICE static float back(Cell cell) { return widen(F16{cell}); }
};
template <>
struct MmaType<float> {
  using Kind = cuda::KindTF32;
  using Cell = uint32_t;
  static constexpr int kDepth = 8;
  NEARFAR_DEVICE static Cell cell(float x) { return cuda::bits_of(cuda::round_tf32(x)); }
  NEARFAR_DEVICE static float back(Cell cell) {
    float value;
    memcpy(&value, &cell, sizeof(value));
    return value;
  }
};

/// R rows of depth D in shared memory, in the direction in which they came. Pitches keep eight neighbouring rows of a
/// fragment in different banks.
template <class Cell, bool K_CONTIGUOUS, int R, int D>
struct MmaPlane {
  static constexpr int kPitch = K_CONTIGUOUS ? D + 16 / static_cast<int>(sizeof(Cell)) : R + 8;
  alignas(16) Cell cells[(K_CONTIGUOUS ? R : D) * kPitch];
  NEARFAR_DEVICE Cell* at(int row, int k) { return cells + (K_CONTIGUOUS ? row * kPitch + k : k * kPitch + row); }
  NEARFAR_DEVICE const Cell* at(int row, int k) const {
    return cells + (K_CONTIGUOUS ? row * kPitch + k : k * kPitch + row);
  }
};

template <class E, int TILE, int PIECES, bool A_CONTIGUOUS, bool B_CONTIGUOUS>
struct Mma {
  using T = float;
  using Type = MmaType<E>;
  using Cell = typename Type::Cell;
  static constexpr bool kHalves = sizeof(Cell) == 2;
  static constexpr int kM = TILE, kN = TILE;
  static constexpr int kDepth = (PIECES == 1 ? 2 : 1) * Type::kDepth;
  static constexpr int kResident = 1;
  static constexpr int kWarpsM = 2, kWarpsN = 4, kRowLanes = 4;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kMmaM = kWarpM / 16, kMmaN = kWarpN / 8;
  static constexpr int kRows = 2 * kMmaM, kCols = 2 * kMmaN;

  struct Memory {
    MmaPlane<Cell, A_CONTIGUOUS, kM, kDepth> a[PIECES];
    MmaPlane<Cell, B_CONTIGUOUS, kN, kDepth> b;
  };
  struct Accumulators {
    float v[kMmaM][kMmaN][4];
  };

  NEARFAR_DEVICE static int warp_m() { return cuda::warp_index() / kWarpsN; }
  NEARFAR_DEVICE static int warp_n() { return cuda::warp_index() % kWarpsN; }
  NEARFAR_DEVICE static int row(int a) { return warp_m() * kWarpM + a / 2 * 16 + a % 2 * 8 + cuda::lane_index() / 4; }
  NEARFAR_DEVICE static int col(int b) { return warp_n() * kWarpN + b / 2 * 8 + b % 2 + cuda::lane_index() % 4 * 2; }
  NEARFAR_DEVICE static float& value(Accumulators& acc, int a, int b) { return acc.v[a / 2][b / 2][a % 2 * 2 + b % 2]; }
  NEARFAR_DEVICE static void clear(Accumulators& acc) {
    NEARFAR_UNROLL
    for (int m = 0; m < kMmaM; ++m) NEARFAR_UNROLL
    for (int n = 0; n < kMmaN; ++n) NEARFAR_UNROLL
    for (int k = 0; k < 4; ++k) acc.v[m][n][k] = 0;
  }

  template <class A, class B>
  NEARFAR_DEVICE static void put(Memory& memory, const Stage<A, kM, kDepth>& stage_a,
                                 const Stage<B, kN, kDepth>& stage_b, const A& a, const B& b, int64_t k0) {
    static_assert(A::kContiguous == A_CONTIGUOUS && B::kContiguous == B_CONTIGUOUS, "operands as the policy was told");
    stage_a.store(a, k0, [&](int row, int k, const Vector<typename A::Element>& vector, const float* factor) {
      put_vector<A, PIECES>(memory.a, row, k, vector, factor);
    });
    stage_b.store(b, k0, [&](int row, int k, const Vector<typename B::Element>& vector, const float* factor) {
      put_vector<B, 1>(&memory.b, row, k, vector, factor);
    });
  }
  template <class Op, int N, class Plane>
  NEARFAR_DEVICE static void put_vector(Plane* planes, int row, int k, const Vector<typename Op::Element>& vector,
                                        const float* factor) {
    constexpr int kSize = Vector<typename Op::Element>::kSize;
    struct alignas(sizeof(Cell) * kSize < 16 ? sizeof(Cell) * kSize : 16) Cells {
      Cell v[kSize];
    } cells[N];
    NEARFAR_UNROLL
    for (int u = 0; u < kSize; ++u) {
      float x = widen(vector.v[u]);
      if (factor) x *= factor[Op::kContiguous ? u : 0];
      NEARFAR_UNROLL
      for (int piece = 0; piece < N; ++piece) {
        cells[piece].v[u] = Type::cell(x);
        // What is infinite or NaN is in the first piece.
        const float rest = x - Type::back(cells[piece].v[u]);
        x = rest == rest ? rest : 0.0f;
      }
    }
    NEARFAR_UNROLL
    for (int piece = 0; piece < N; ++piece) *reinterpret_cast<Cells*>(planes[piece].at(row, k)) = cells[piece];
  }

  template <class A, class B>
  NEARFAR_DEVICE static void step(const Memory& memory, Accumulators& acc) {
    NEARFAR_UNROLL
    for (int k = 0; k < kDepth; k += Type::kDepth) {
      uint32_t b[kMmaN][2];
      read_b(memory.b, k, b);
      NEARFAR_UNROLL
      for (int piece = 0; piece < PIECES; ++piece) NEARFAR_UNROLL
      for (int m = 0; m < kMmaM; ++m) {
        uint32_t a[4];
        read_a(memory.a[piece], warp_m() * kWarpM + 16 * m, k, a);
        NEARFAR_UNROLL
        for (int n = 0; n < kMmaN; ++n) cuda::mma(typename Type::Kind{}, acc.v[m][n], a, b[n]);
      }
    }
  }

  template <class Plane>
  NEARFAR_DEVICE static void read_a(const Plane& plane, int row, int k, uint32_t (&a)[4]) {
    const int lane = cuda::lane_index();
    if constexpr (kHalves) {
      if constexpr (A_CONTIGUOUS) {
        cuda::load_matrices<false>(a, plane.at(row + lane % 16, k + lane / 16 * 8));
      } else {
        cuda::load_matrices<true>(a, plane.at(row + lane / 8 % 2 * 8, k + lane % 8 + lane / 16 * 8));
      }
    } else {
      NEARFAR_UNROLL
      for (int q = 0; q < 4; ++q) a[q] = *plane.at(row + lane / 4 + q % 2 * 8, k + lane % 4 + q / 2 * 4);
    }
  }
  template <class Plane>
  NEARFAR_DEVICE static void read_b(const Plane& plane, int k, uint32_t (&b)[kMmaN][2]) {
    const int lane = cuda::lane_index(), column = warp_n() * kWarpN;
    if constexpr (kHalves) {
      static_assert(kMmaN % 2 == 0, "two fragments at a time");
      NEARFAR_UNROLL
      for (int n = 0; n < kMmaN; n += 2) {
        uint32_t four[4];
        const int from = column + 8 * n;
        if constexpr (B_CONTIGUOUS) {
          cuda::load_matrices<false>(four, plane.at(from + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
        } else {
          cuda::load_matrices<true>(four, plane.at(from + lane / 16 * 8, k + lane % 16));
        }
        b[n][0] = four[0], b[n][1] = four[1], b[n + 1][0] = four[2], b[n + 1][1] = four[3];
      }
    } else {
      NEARFAR_UNROLL
      for (int n = 0; n < kMmaN; ++n) NEARFAR_UNROLL
      for (int q = 0; q < 2; ++q) b[n][q] = *plane.at(column + 8 * n + lane / 4, k + lane % 4 + 4 * q);
    }
  }
};

}  // namespace device
}  // namespace nearfar
