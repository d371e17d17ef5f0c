// The tile engine: one kernel, C[i][j] = sum_k A[i][k] B[j][k], whose epilogue is a functor on the tile in registers.
//
// Every product of the library is this kernel: scores (A = rows of x, B = rows of y), dX = W Y (A = a strip of weights,
// B = the columns of y) and dY = W^T X. An operand is a matrix with one contiguous direction, padded with zeros to
// whole tiles, so that no load has a bound. How a tile is multiplied is a policy: simt.hpp (true float32 and float64)
// or mma.hpp (tensor cores).
//
// A policy gives each thread an outer product of rows and columns of the tile: accumulator (a, b) is row `row(a)` and
// column `col(b)`. Lanes that differ in the bits below kRowLanes share rows, the others share columns; kWarpsN warps
// share rows, kWarpsM share columns. That is all an epilogue needs for reductions along either direction.
#pragma once

#include "cuda/rows.hpp"
#include "pairwise/map.hpp"

namespace nearfar {
inline namespace device {

/// Element (row, k) is data[row * stride + k], or with K_CONTIGUOUS false data[k * stride + row]. `factor` multiplies
/// step k; null: 1.
template <class E, bool K_CONTIGUOUS>
struct Operand {
  using Element = E;
  static constexpr bool kContiguous = K_CONTIGUOUS;
  const E* data;
  int64_t stride;
  const float* factor = nullptr;

  NEARFAR_DEVICE const E* at(int64_t row, int64_t k) const {
    return K_CONTIGUOUS ? data + row * stride + k : data + k * stride + row;
  }
};

/// ROWS x DEPTH of an operand on its way from global to shared memory, in the registers of a block.
template <class Op, int ROWS, int DEPTH>
struct Stage {
  using E = typename Op::Element;
  static constexpr int kWide = Vector<E>::kSize;
  static constexpr int kVectors = ROWS * DEPTH / kWide;
  static constexpr int kEach = (kVectors + cuda::kThreads - 1) / cuda::kThreads;
  static constexpr int kAcross = (Op::kContiguous ? DEPTH : ROWS) / kWide;  // vectors in the contiguous direction
  static_assert(kAcross > 0 && ROWS * DEPTH % kWide == 0, "a tile is whole vectors");
  Vector<E> vectors[kEach];

  NEARFAR_DEVICE static bool has(int c) {
    return kVectors % cuda::kThreads == 0 || c * cuda::kThreads + cuda::thread_index() < kVectors;
  }
  NEARFAR_DEVICE static void place(int c, int& row, int& k) {
    const int vector = c * cuda::kThreads + cuda::thread_index();
    const int along = vector % kAcross * kWide, across = vector / kAcross;
    row = Op::kContiguous ? across : along;
    k = Op::kContiguous ? along : across;
  }
  NEARFAR_DEVICE void load(const Op& op, int64_t row0, int64_t k0) {
    NEARFAR_UNROLL
    for (int c = 0; c < kEach; ++c) {
      if (!has(c)) continue;
      int row, k;
      place(c, row, k);
      vectors[c] = *reinterpret_cast<const Vector<E>*>(op.at(row0 + row, k0 + k));
    }
  }
  /// put(row, k, value of element (row, k)): the policy's way to shared memory.
  template <class Put>
  NEARFAR_DEVICE void store(const Op& op, int64_t k0, Put put) const {
    NEARFAR_UNROLL
    for (int c = 0; c < kEach; ++c) {
      if (!has(c)) continue;
      int row, k;
      place(c, row, k);
      put(row, k, vectors[c], op.factor ? op.factor + k0 + k : nullptr);
    }
  }
};

/// Two neighbours.
template <class T>
struct alignas(2 * sizeof(T)) Two {
  T first, second;
};

/// The tile as an epilogue sees it.
template <class P>
struct Fragment {
  typename P::Accumulators& acc;
  int64_t i0, j0;
  char* memory = nullptr;  // shared, free for the epilogue: wgmma.hpp
  NEARFAR_DEVICE int64_t i(int a) const { return i0 + P::row(a); }
  NEARFAR_DEVICE int64_t j(int b) const { return j0 + P::col(b); }
  NEARFAR_DEVICE typename P::T& operator()(int a, int b) const { return P::value(acc, a, b); }
  template <class F>
  NEARFAR_DEVICE void for_each(F f) const {
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b) f(i(a), j(b), P::value(acc, a, b));
  }
  /// f(value, x, y) with the numbers of its row and column, of which these are the tile's.
  template <class F>
  NEARFAR_DEVICE void for_each(const typename P::T* of_rows, const typename P::T* of_columns, F f) const {
    using T = typename P::T;
    T x[P::kRows];
    // One address each, and what the others add to it is a constant.
    of_rows += cuda::opaque(P::row(0)), of_columns += cuda::opaque(P::col(0));
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) x[a] = of_rows[P::row(a) - P::row(0)];
    NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; b += 2) {  // neighbours
      const Two<T> y = *reinterpret_cast<const Two<T>*>(of_columns + (P::col(b) - P::col(0)));
      NEARFAR_UNROLL
      for (int a = 0; a < P::kRows; ++a) {
        f(P::value(acc, a, b), x[a], y.first);
        f(P::value(acc, a, b + 1), x[a], y.second);
      }
    }
  }

  // Pairs that need something else are a bit each of a word, (a, b) at a * kCols + b, looked at before or after the
  // others: a branch for every pair would make each wait for its own loads.

  /// Those that `has(i, j)` denies; none of a tile that is whole.
  template <class Has>
  NEARFAR_DEVICE uint64_t without(bool whole, Has has) const {
    uint64_t bits = 0;
    if (whole) return bits;
    NEARFAR_ROLLED
    for (int bit = 0; bit < P::kRows * P::kCols; ++bit)
      bits |= uint64_t(!has(i(bit / P::kCols), j(bit % P::kCols))) << bit;
    return bits;
  }
  /// Those with `is(a, b)`, which are few.
  template <class Is>
  NEARFAR_DEVICE uint64_t find(Is is) const {
    static_assert(P::kRows * P::kCols <= 64, "one bit for every accumulator");
    bool any = false;
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b) any |= is(a, b);
    uint64_t bits = 0;
    if (!any) return bits;
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b) bits |= uint64_t(is(a, b)) << (a * P::kCols + b);
    return bits;
  }
  NEARFAR_DEVICE void replace(uint64_t bits, typename P::T value) const {
    if (bits == 0) return;
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b)
      if (bits >> (a * P::kCols + b) & 1) P::value(acc, a, b) = value;
  }
  /// By numbers known at run time only: registers have no index.
  NEARFAR_DEVICE void set(int row, int column, typename P::T value) const {
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b)
      if (a == row && b == column) P::value(acc, a, b) = value;
  }
  /// f(a, b) of each.
  template <class F>
  NEARFAR_DEVICE static void for_bits(uint64_t bits, F f) {
    for (; bits; bits &= bits - 1) {
      const int bit = cuda::lowest_bit(bits);
      f(bit / P::kCols, bit % P::kCols);
    }
  }
  /// Row a to line(a)[column] of global memory, which has room for the tile.
  template <class Line>
  NEARFAR_DEVICE void store(Line line) const {
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) store_line(a, line(a));
  }
  /// The same without the pairs in `hidden`, to any place.
  template <class Line>
  NEARFAR_DEVICE void store(uint64_t hidden, Line line) const {
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      typename P::T* to = line(a);
      if (hidden == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(Two<typename P::T>) == 0) {
        store_line(a, to);
      } else {
        NEARFAR_UNROLL
        for (int b = 0; b < P::kCols; ++b)
          if (!(hidden >> (a * P::kCols + b) & 1)) to[P::col(b)] = P::value(acc, a, b);
      }
    }
  }

 private:
  NEARFAR_DEVICE void store_line(int a, typename P::T* to) const {
    NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; b += 2)
      cuda::store_together(to + P::col(b), {P::value(acc, a, b), P::value(acc, a, b + 1)});
  }
};

/// One tile a block. Rows of tiles run fastest: neighbouring blocks share the tile of B.
template <class P, class A, class B, class Epilogue>
struct TileKernel {
  static constexpr int kResident = P::kResident;
  A a;
  B b;
  int64_t tiles_m, tiles_n, depth;
  int64_t splits;  // of the depth, the slowest index
  Epilogue epilogue;
  P policy;

  NEARFAR_DEVICE void operator()() const {
    NEARFAR_SHARED typename P::Memory memory[2];
    const int64_t block = cuda::block_index();
    const int64_t tile_m = block % tiles_m, tile_n = block / tiles_m % tiles_n, split = block / (tiles_m * tiles_n);
    const int64_t i0 = tile_m * P::kM, j0 = tile_n * P::kN;
    if (!epilogue.wants(i0, j0, P::kM, P::kN)) return;
    const int64_t steps = (depth + P::kDepth - 1) / P::kDepth;
    const int64_t begin = steps * split / splits * P::kDepth, end = steps * (split + 1) / splits * P::kDepth;
    typename P::Accumulators acc;
    P::clear(acc);
    Stage<A, P::kM, P::kDepth> stage_a;
    Stage<B, P::kN, P::kDepth> stage_b;
    if (begin < end) {
      stage_a.load(a, i0, begin);
      stage_b.load(b, j0, begin);
      P::template put<A, B>(memory[0], stage_a, stage_b, a, b, begin);
    }
    cuda::sync_block();
    int buffer = 0;
    for (int64_t k = begin; k < end; k += P::kDepth) {
      const bool more = k + P::kDepth < end;
      if (more) {
        stage_a.load(a, i0, k + P::kDepth);
        stage_b.load(b, j0, k + P::kDepth);
      }
      policy.template step<A, B>(memory[buffer], acc);
      buffer ^= 1;
      if (more) P::template put<A, B>(memory[buffer], stage_a, stage_b, a, b, k + P::kDepth);
      cuda::sync_block();
    }
    epilogue.template apply<P>(Fragment<P>{acc, i0, j0}, tile_m, tile_n, split);
  }
};

template <class P, class A, class B, class Epilogue>
void launch_tiles(cuda::Context& c, const A& a, const B& b, int64_t rows, int64_t columns, int64_t depth,
                  int64_t splits, const Epilogue& epilogue, const P& policy = {}) {
  const int64_t tiles_m = ceil_div(rows, P::kM), tiles_n = ceil_div(columns, P::kN);
  c.launch(tiles_m * tiles_n * splits,
           TileKernel<P, A, B, Epilogue>{a, b, tiles_m, tiles_n, depth, splits, epilogue, policy});
}

// ---- reductions of a tile
// --------------------------------------------------------------------------------------------

/// A mergeable pair, max m and sum s of e^(v - m), of a part of a row or column.
template <class T>
struct PartialSum {
  T m, s;
};

/// The first of the lanes of a warp that share rows.
template <class P>
NEARFAR_DEVICE bool first_of_row() {
  return cuda::lane_index() % P::kRowLanes == 0;
}
/// Over these lanes; all have it.
template <class P>
NEARFAR_DEVICE typename P::T sum_of_row(typename P::T value) {
  NEARFAR_UNROLL
  for (int mask = 1; mask < P::kRowLanes; mask *= 2) value += cuda::shuffle_xor(value, mask);
  return value;
}

/// Log-sum-exp of every row (ROWS) or column of the tile; place(k, partial) is called once for each, by one thread.
template <class P, bool ROWS, class Place>
NEARFAR_DEVICE void reduce_lse(const Fragment<P>& f, Place place) {
  using T = typename P::T;
  constexpr int kLines = ROWS ? P::kRows : P::kCols, kAcross = ROWS ? P::kCols : P::kRows;
  constexpr int kSize = ROWS ? P::kM : P::kN, kParts = ROWS ? P::kWarpsN : P::kWarpsM;
  NEARFAR_SHARED PartialSum<T> parts[kParts][kSize];
  const int lane = cuda::lane_index();
  const int first = ROWS ? 1 : P::kRowLanes, last = ROWS ? P::kRowLanes : cuda::kWarp;
  NEARFAR_UNROLL
  for (int line = 0; line < kLines; ++line) {
    T top = -infinity<T>();
    NEARFAR_UNROLL
    for (int k = 0; k < kAcross; ++k) top = largest(top, ROWS ? f(line, k) : f(k, line));
    NEARFAR_UNROLL
    for (int mask = first; mask < last; mask *= 2) top = largest(top, cuda::shuffle_xor(top, mask));
    const T base = top == -infinity<T>() ? T(0) : top;
    T sum = 0;
    NEARFAR_UNROLL
    for (int k = 0; k < kAcross; ++k) sum += exp_flush((ROWS ? f(line, k) : f(k, line)) - base);
    NEARFAR_UNROLL
    for (int mask = first; mask < last; mask *= 2) sum += cuda::shuffle_xor(sum, mask);
    if (ROWS ? lane % P::kRowLanes == 0 : lane < P::kRowLanes)
      parts[ROWS ? P::warp_n() : P::warp_m()][ROWS ? P::row(line) : P::col(line)] = {base, sum};
  }
  cuda::sync_block();
  for (int k = cuda::thread_index(); k < kSize; k += cuda::kThreads) {
    PartialSum<T> total = parts[0][k];
    for (int part = 1; part < kParts; ++part) {
      const PartialSum<T> other = parts[part][k];
      if (other.s == 0) continue;
      const T top = total.s == 0 ? other.m : largest(total.m, other.m);
      total.s = (total.s == 0 ? T(0) : total.s * exp_flush(total.m - top)) + other.s * exp_flush(other.m - top);
      total.m = top;
    }
    place(k, total);
  }
  cuda::sync_block();
}

/// The sum of one double of every thread, in a fixed order; all have it.
NEARFAR_DEVICE double block_sum(double value) {
  NEARFAR_SHARED double sums[cuda::kWarps];
  value = cuda::warp_sum(value);
  if (cuda::lane_index() == 0) sums[cuda::warp_index()] = value;
  cuda::sync_block();
  double total = 0;
  for (int w = 0; w < cuda::kWarps; ++w) total += sums[w];
  cuda::sync_block();
  return total;
}

/// The largest of one double of every thread; all have it.
NEARFAR_DEVICE double block_largest(double value) {
  NEARFAR_SHARED double most[cuda::kWarps];
  for (int mask = cuda::kWarp / 2; mask > 0; mask /= 2) value = largest(value, cuda::shuffle_xor(value, mask));
  if (cuda::lane_index() == 0) most[cuda::warp_index()] = value;
  cuda::sync_block();
  value = most[0];
  for (int w = 1; w < cuda::kWarps; ++w) value = largest(value, most[w]);
  cuda::sync_block();
  return value;
}

}  // namespace device
}  // namespace nearfar
