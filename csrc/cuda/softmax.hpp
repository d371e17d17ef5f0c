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
  /// body(exponential), where exponential(x, y, product, a, b) is e^{s - bound} for the factors of the pair's rows.
  template <class P, class Body>
  NEARFAR_DEVICE void with_exponentials(const Fragment<P>& f, const Block& block, Body body) const {
    const float scale = static_cast<float>(multiplier()) * cuda::kLog2E;
    with_hidden(f, block, [&](auto hides) {
      body([=](float x, float y, float product, int a, int b) {
        return hides(a, b) ? 0.0f : cuda::exp2_fast(product * (scale * x * y) - scale);
      });
    });
  }
  template <class P, class Body>
  NEARFAR_DEVICE void with_hidden(const Fragment<P>& f, const Block& block, Body body) const {
    const int64_t i0 = block.row + f.i0, j0 = block.column + f.j0;
    device::with_hidden(whole(i0, j0), [&](int i, int j) { return has(i0 + i, j0 + j); }, body);
  }
  /// Factors of the tile's rows and columns.
  template <class P>
  NEARFAR_DEVICE const float* x_of(const Fragment<P>& f, const Block& block) const {
    return scores.x_factor + block.row + f.i0;
  }
  template <class P>
  NEARFAR_DEVICE const float* y_of(const Fragment<P>& f, const Block& block) const {
    return scores.y_factor + block.column + f.j0;
  }
  /// In place, for a whole tile.
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, const Block& block) const {
    const T scale = static_cast<T>(multiplier());
    if constexpr (is_blocked<P>) {
      return with_hidden(f, block, [&](auto hides) {
        for_each_pair(f, {x_of(f, block)}, {y_of(f, block)},
                      [=](const float* x, const float* y, float product, int a, int b) {
                        return hides(a, b) ? -infinity<float>() : scale * (product * (*x * *y));
                      });
      });
    }
    const int64_t i0 = block.row + f.i0, j0 = block.column + f.j0;
    const uint64_t hidden =
        f.without(whole(i0, j0), [&](int64_t i, int64_t j) { return has(block.row + i, block.column + j); });
    scores.apply(f, i0, j0, hidden);
    f.for_each([&](int64_t, int64_t, T& value) { value *= scale; });
    f.replace(hidden, -infinity<T>());
  }
};

/// Partial states of rows and columns by tile; `keep` also stores the scores.
template <class T, bool KEEPS_BLOCKS>
struct LseEpilogue {
  static constexpr bool kDistances = false, kBlocked = true, kOverlaps = true;
  MaskedScores<T> masked;
  Weights<T> keep;  // w null: not kept
  Block block;
  int64_t tiles_m, tiles_n;
  PartialSum<T>*of_rows, *of_columns;  // [row][tile_n], [column][tile_m]; of_columns null: not wanted

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t tile_m, int64_t tile_n, int64_t) const {
    if constexpr (is_blocked<P>)
      if (masked.bounded()) return sum_exponentials(f, tile_m, tile_n);
    masked.apply(f, block);
    if constexpr (!is_blocked<P>)
      if (keep.w) keep.store(f);
    reduce_lse<P, true>(f, [&](int i, const PartialSum<T>& sum) { of_rows[(f.i0 + i) * tiles_n + tile_n] = sum; });
    if constexpr (!KEEPS_BLOCKS)
      if (of_columns)
        reduce_lse<P, false>(f,
                             [&](int j, const PartialSum<T>& sum) { of_columns[(f.j0 + j) * tiles_m + tile_m] = sum; });
  }

 private:
  template <class P>
  NEARFAR_DEVICE void sum_exponentials(const Fragment<P>& f, int64_t tile_m, int64_t tile_n) const {
    const T base = static_cast<T>(masked.multiplier());
    float sums[P::kRows] = {};
    masked.with_exponentials(f, block, [&](auto exponential) {
      const auto add = [&](const float* x, const float* y, float product, int a, int b) {
        const float e = exponential(*x, *y, product, a, b);
        sums[a] += e;
        return e;
      };
      if constexpr (KEEPS_BLOCKS) {
        keep.weigh(f, {masked.x_of(f, block)}, {masked.y_of(f, block)}, add);
      } else {
        for_each_pair(f, {masked.x_of(f, block)}, {masked.y_of(f, block)}, add);
      }
    });
    place_rows<P>(sums, [&](int i, float sum) { of_rows[(f.i0 + i) * tiles_n + tile_n] = {base, sum}; });
    if constexpr (!KEEPS_BLOCKS)
      if (of_columns)
        sum_columns(f, [&](int j, float sum) { of_columns[(f.j0 + j) * tiles_m + tile_m] = {base, sum}; });
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
    masked.apply(f, b);
    if constexpr (is_blocked<P>) {
      const int64_t i = b.row + f.i0, j = b.column + f.j0;
      return for_each_pair(f, {weight.row_base + i, weight.row_weight + i},
                           {weight.column_base + j, weight.column_weight + j},
                           [](const float* x, const float* y, float score, int, int) {
                             return x[1] * exp_flush(score - x[0]) + y[1] * exp_flush(score - y[0]);
                           });
    }
    f.for_each([&](int64_t i, int64_t j, T& value) { value = weight(b.row + i, b.column + j, value); });
  }
};

template <class T>
struct WeightEpilogue {
  static constexpr bool kDistances = false, kBlocked = true, kOverlaps = true;
  WeighPairs<T> weigh;
  Weights<T> out;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    const Block& block = out.block;
    const MaskedScores<T>& masked = weigh.masked;
    if constexpr (is_blocked<P>) {
      if (masked.bounded())
        return masked.with_exponentials(f, block, [&](auto exponential) {
          out.weigh(f, {masked.x_of(f, block), weigh.weight.row_weight + block.row + f.i0},
                    {masked.y_of(f, block), weigh.weight.column_weight + block.column + f.j0},
                    [=](const float* x, const float* y, float product, int a, int b) {
                      return exponential(x[0], y[0], product, a, b) * (x[1] + y[1]);
                    });
        });
    }
    weigh.apply(f, block);
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
