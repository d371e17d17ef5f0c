// Weights of a block of pairs, what a gradient multiplies; and those of its pairs that enter by their difference.
#pragma once

#include "cuda/rounding.hpp"

namespace nearfar {
inline namespace device {

/// A block of weights: element (i, j) of all pairs is w[(i - row) * pitch + j - column]. Bits of `near` mark pairs that
/// enter by their difference, where x_i and y_j would cancel in the products.
///
/// Of blocked rows the weights are blocked too, of the rows' type, and hold the factors of both rows: the products are
/// divided by their own row's.
template <class T>
struct Weights {
  T* w;
  uint32_t* near;  // null: none
  int64_t pitch;
  Block block;
  Blocked blocks{};
  const T *x_factor = nullptr, *y_factor = nullptr;
  Rounding<T> rounding{};  // what they lose: blocked ones of a gradient

  NEARFAR_DEVICE bool stored() const { return w || blocks.data; }
  /// A whole tile of accumulators, which the strip has room for: of blocked weights once in an epilogue, at its end.
  template <class P>
  NEARFAR_DEVICE void store(const Fragment<P>& f) const {
    if constexpr (is_blocked<P>) {
      return weigh(f, {x_factor + block.row + f.i0}, {y_factor + block.column + f.j0},
                   [](const float*, const float*, float value, int, int) { return value; });
    }
    f.store([&](int a) { return w + f.i(a) * pitch + f.j0; });
  }
  /// Blocked: the same where weights are still to be computed, as for_each_pair does; what is not stored is computed
  /// too.
  template <class P, int R, int C, class Value>
  NEARFAR_DEVICE void weigh(const Fragment<P>& f, const float* const (&of_rows)[R], const float* const (&of_columns)[C],
                            Value value) const {
    const float *rows[R + 1], *columns[C + 1];
    NEARFAR_UNROLL
    for (int r = 0; r < R; ++r) rows[r] = of_rows[r];
    NEARFAR_UNROLL
    for (int c = 0; c < C; ++c) columns[c] = of_columns[c];
    rows[R] = stored() ? x_factor + block.row + f.i0 : rows[0];
    columns[C] = stored() ? y_factor + block.column + f.j0 : columns[0];
    for_each_pair(
        f, rows, columns,
        [&](const float* x, const float* y, float v, int a, int b) { return value(x, y, v, a, b) * (x[R] * y[C]); },
        [&](int half) {
          if (!stored()) return;
          store_half(f, blocks, f.i0 / P::kM, f.j0 / P::kN, half);
          rounding.sum_half(f, block, half);
        });
  }

  NEARFAR_DEVICE T& at(int64_t i, int64_t j) const { return w[(i - block.row) * pitch + j - block.column]; }
  NEARFAR_DEVICE uint32_t* word(int64_t i, int64_t j) const {
    return near + ((i - block.row) * pitch + j - block.column) / 32;
  }
  NEARFAR_DEVICE void mark(int64_t i, int64_t j) const { cuda::atomic_or(word(i, j), 1u << ((j - block.column) & 31)); }
};

/// Near pairs of one column, a warp each: dy_j += sum_i w_ij (y_j - x_i).
template <class T>
struct NearColumns {
  Weights<T> weights;
  Source<T> x, y;
  T* dy;
  NEARFAR_DEVICE void operator()() const {
    const Block& b = weights.block;
    const int64_t j = b.column + cuda::global_warp(), d = y.rows.d;
    if (j >= y.rows.n || j >= b.column + b.columns) return;
    for (int64_t i0 = b.row; i0 < b.row + b.rows && i0 < x.rows.n; i0 += cuda::kWarp) {
      const int64_t own = i0 + cuda::lane_index();
      const bool near = own < x.rows.n && (*weights.word(own, j) >> ((j - b.column) & 31) & 1);
      for (uint32_t bits = cuda::ballot(near); bits; bits &= bits - 1) {
        const int64_t i = i0 + cuda::lowest_bit(bits);
        const T w = weights.at(i, j);
        NEARFAR_ROLLED
        for (int64_t k = cuda::lane_index(); k < d; k += cuda::kWarp) dy[j * d + k] += w * (y.get(j, k) - x.get(i, k));
      }
    }
  }
};

/// Near pairs of one row, a warp each: dx_i += sum_j w_ij (x_i - y_j); they leave the block. Then the sum of the rest.
template <class T>
struct NearRows {
  Weights<T> weights;
  Source<T> x, y;
  T* dx;
  T* row_sums;
  NEARFAR_DEVICE void operator()() const {
    const Block& b = weights.block;
    const int64_t i = b.row + cuda::global_warp(), d = x.rows.d;
    const int lane = cuda::lane_index();
    if (i >= b.row + b.rows) return;
    for (int64_t j0 = b.column; i < x.rows.n && j0 < b.column + b.columns && j0 < y.rows.n; j0 += 32 * cuda::kWarp) {
      const int64_t own = j0 + 32 * lane;
      const uint32_t mine = own < b.column + b.columns && own < y.rows.n ? *weights.word(i, own) : 0;
      for (uint32_t words = cuda::ballot(mine != 0); words; words &= words - 1) {
        const int from = cuda::lowest_bit(words);
        for (uint32_t bits = cuda::shuffle(mine, from); bits; bits &= bits - 1) {
          const int64_t j = j0 + 32 * from + cuda::lowest_bit(bits);
          const T w = weights.at(i, j);
          cuda::sync_warp();
          if (lane == 0) weights.at(i, j) = 0;
          NEARFAR_ROLLED
          for (int64_t k = lane; k < d; k += cuda::kWarp) dx[i * d + k] += w * (x.get(i, k) - y.get(j, k));
        }
      }
    }
    cuda::sync_warp();
    T sum = 0;
    for (int64_t j = b.column + lane; j < b.column + b.columns; j += cuda::kWarp) sum += weights.at(i, j);
    sum = cuda::warp_sum(sum);
    if (lane == 0) row_sums[i - b.row] = sum;
  }
};

template <class T>
struct ColumnSums {
  Weights<T> weights;
  T* sums;
  NEARFAR_DEVICE void operator()() const {
    const Block& b = weights.block;
    const int64_t j = cuda::global_thread();
    if (j >= b.columns) return;
    T sum = 0;
    for (int64_t i = 0; i < b.rows; ++i) sum += weights.w[i * weights.pitch + j];
    sums[j] = sum;
  }
};

}  // namespace device
}  // namespace nearfar
