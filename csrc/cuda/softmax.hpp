// Softmax over pairs, what its operations share: masked scores, the log-sum-exps of rows and columns of a block, and
// weights from known normalisers. What they are for is said in cpu/ops/softmax.cpp.
#pragma once

#include "cuda/loss.hpp"

namespace nearfar {
inline namespace device {

/// Scaled scores, -inf where a pair is not in the denominator.
template <class T>
struct MaskedScores {
  Scores<T> scores;
  Multiplier multiplier;
  int64_t n, m, skip_shift;    // leave out column (i + shift) % n of row i; -1: none
  bool pairs;                  // leave out column i of row i
  const int64_t *ids, *ids_y;  // equal ones are left out; ids_y: of the first ids_m columns
  int64_t ids_m;
  bool unit = false;  // rows have norm one at most

  NEARFAR_DEVICE bool has(int64_t i, int64_t j) const {
    if (i >= n || j >= m || (pairs && i == j)) return false;
    if (skip_shift >= 0 && j < n && j == (i + skip_shift < n ? i + skip_shift : i + skip_shift - n)) return false;
    return !(ids && j < ids_m && ids[i] == ids_y[j]);
  }
  /// Are all of 128 x 128 pairs in the denominator?
  NEARFAR_DEVICE bool whole(int64_t i, int64_t j) const {
    if (i + 128 > n || j + 128 > m || (pairs && i == j) || ids) return false;
    const int64_t from = j - i - skip_shift;  // 0 or -n on the columns to skip
    return skip_shift < 0 || ((from <= -128 || from >= 128) && (from + n <= -128 || from + n >= 128));
  }
  /// Scores of unit rows lie within the multiplier: then e^{s - bound} of all pairs is neither too large nor too small,
  /// and serves rows, columns and weights alike.
  NEARFAR_DEVICE bool bounded() const { return bounded_by(unit, multiplier()); }
  NEARFAR_HOST_DEVICE static bool bounded_by(bool unit, double scale) { return unit && scale <= 30; }
  /// In place, e^{s - bound}.
  template <class P>
  NEARFAR_DEVICE void exponentials(const Fragment<P>& f, int64_t row, int64_t column) const {
    const float scale = static_cast<float>(multiplier()) * cuda::kLog2E;
    const int64_t i0 = row + f.i0, j0 = column + f.j0;
    uint32_t hidden[P::kRows];
    hide(i0, j0, hidden);
    for_each_pair(f, scores.x_factor + i0, scores.y_factor + j0, [&](float x, float y, float value, int a, int b) {
      return hidden[a] >> b & 1 ? 0.0f : cuda::exp2_fast(scale * (value * (x * y)) - scale);
    });
  }
  NEARFAR_DEVICE void hide(int64_t i0, int64_t j0, uint32_t (&hidden)[WgmmaTile::kRows]) const {
    hide_pairs(whole(i0, j0), [&](int i, int j) { return has(i0 + i, j0 + j); }, hidden);
  }
  /// In place, for a whole tile.
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t row, int64_t column) const {
    const T scale = static_cast<T>(multiplier());
    if constexpr (is_blocked<P>) {
      uint32_t hidden[P::kRows];
      hide(row + f.i0, column + f.j0, hidden);
      return for_each_pair(f, scores.x_factor + row + f.i0, scores.y_factor + column + f.j0,
                           [&](float x, float y, float value, int a, int b) {
                             return hidden[a] >> b & 1 ? -infinity<float>() : scale * (value * (x * y));
                           });
    }
    const int64_t i0 = row + f.i0, j0 = column + f.j0;
    const uint64_t hidden =
        f.without(whole(i0, j0), [&](int64_t i, int64_t j) { return has(row + i, column + j); });
    scores.apply(f, i0, j0, hidden);
    f.for_each([&](int64_t, int64_t, T& value) { value *= scale; });
    f.replace(hidden, -infinity<T>());
  }
};

/// Partial states of rows and columns by tile; `keep` also stores the scores.
template <class T, bool KEEPS_BLOCKS>
struct LseEpilogue {
  static constexpr bool kDistances = false, kStores = KEEPS_BLOCKS;
  MaskedScores<T> masked;
  Weights<T> keep;  // w null: not kept
  Block block;
  int64_t tiles_m, tiles_n;
  PartialSum<T>*of_rows, *of_columns;  // [row][tile_n], [column][tile_m]; of_columns null: not wanted

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t tile_m, int64_t tile_n, int64_t) const {
    if constexpr (is_blocked<P>) {
      if (masked.bounded()) {
        const T base = static_cast<T>(masked.multiplier());
        masked.exponentials(f, block.row, block.column);
        sum_lines(
            f, of_columns, [&](int i, float sum) { of_rows[(f.i0 + i) * tiles_n + tile_n] = {base, sum}; },
            [&](int j, float sum) { of_columns[(f.j0 + j) * tiles_m + tile_m] = {base, sum}; });
        if (KEEPS_BLOCKS) keep.store(f);
        return;
      }
    }
    masked.apply(f, block.row, block.column);
    if (keep.w) f.for_each([&](int64_t i, int64_t j, T score) { keep.w[i * keep.pitch + j] = score; });
    reduce_lse<P, true>(f, [&](int i, const PartialSum<T>& sum) { of_rows[(f.i0 + i) * tiles_n + tile_n] = sum; });
    if (of_columns)
      reduce_lse<P, false>(f,
                           [&](int j, const PartialSum<T>& sum) { of_columns[(f.j0 + j) * tiles_m + tile_m] = sum; });
  }
};

/// u_i e^{s_ij - a_i} + v_j e^{s_ij - b_j}
template <class T>
struct PairWeight {
  const T *row_base, *row_weight, *column_base, *column_weight;
  NEARFAR_DEVICE T operator()(int64_t i, int64_t j, T score) const {
    if (score == -infinity<T>()) return 0;
    const T own = row_weight[i] * exp_flush(score - row_base[i]);
    return column_base ? own + column_weight[j] * exp_flush(score - column_base[j]) : own;
  }
};

/// The weights of a block of scores, in place.
template <class T>
struct WeighPairs {
  MaskedScores<T> masked;
  PairWeight<T> weight;

  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, const Block& b) const {
    if constexpr (is_blocked<P>) {
      if (masked.bounded()) {
        masked.exponentials(f, b.row, b.column);
        return for_each_pair(f, weight.row_weight + b.row + f.i0, weight.column_weight + b.column + f.j0,
                             [](float row, float column, float value, int, int) { return value * (row + column); });
      }
      masked.apply(f, b.row, b.column);
      return for_each_pair(f, weight.row_base + b.row + f.i0, weight.column_base + b.column + f.j0,
                           weight.row_weight + b.row + f.i0, weight.column_weight + b.column + f.j0,
                           [](float x, float y, float u, float v, float score) {
                             return u * exp_flush(score - x) + v * exp_flush(score - y);
                           });
    }
    masked.apply(f, b.row, b.column);
    f.for_each([&](int64_t i, int64_t j, T& value) { value = weight(b.row + i, b.column + j, value); });
  }
};

template <class T>
struct WeightEpilogue {
  static constexpr bool kDistances = false, kStores = true;
  WeighPairs<T> weigh;
  Weights<T> out;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    weigh.apply(f, out.block);
    out.store(f);
  }
};

/// Partial states of a block's rows, and of its columns where `of_columns` is there, join their states.
template <class T, class E>
void merge_lse(cuda::Context& c, const Pairs<T, E>& pairs, const Block& b, const Plan& plan,
               const PartialSum<T>* of_rows, const PartialSum<T>* of_columns, LogSumExp* states,
               LogSumExp* column_states) {
  const int64_t tiles_m = ceil_div(b.rows, plan.tile), tiles_n = ceil_div(b.columns, plan.tile);
  const int64_t n = pairs.x.n, m = pairs.y.n, rows = b.rows < n - b.row ? b.rows : n - b.row,
                columns = b.columns < m - b.column ? b.columns : m - b.column;
  c.launch_warps(rows, MergeLogSumExps<T>{of_rows, tiles_n, rows, 1, 1, states + b.row});
  if (of_columns)
    c.launch_warps(columns, MergeLogSumExps<T>{of_columns, tiles_m, columns, 1, 1, column_states + b.column});
}

/// Where columns take no part: 0 e^{s - infinity}.
template <class T>
void fill_absent(cuda::Context& c, int64_t padded, T* base, T* weight) {
  c.launch_threads(padded, Fill<T>{base, padded, static_cast<T>(HUGE_VAL)});
  c.launch_threads(padded, Fill<T>{weight, padded, T(0)});
}

/// Gradients from known normalisers.
template <class T, class E>
void weight_blocks(cuda::Context& c, const Pairs<T, E>& pairs, Strip<T, E>& strip, const MaskedScores<T>& masked,
                   const PairWeight<T>& weight) {
  strip.for_blocks([&](const Weights<T>& weights) {
    const Plan plan = plan_scores(c, "softmax weights", pairs, weights.block);
    launch_scores(c, plan, pairs, weights.block, WeightEpilogue<T>{{masked, weight}, weights});
    strip.products(weights);
  });
}

}  // namespace device
}  // namespace nearfar
