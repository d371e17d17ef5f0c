// What rounding takes from 16-bit weights.
//
// Weights that are alike round alike; and where rows are nearly equal, their gradients are differences of what such
// weights multiply, so that this would be all that is left of them. So what rounding takes from every row and column of
// weights is summed, and enters times the mean of the rows that it would have met (cpu/halves.hpp does the same):
// errors are those of rows about their mean. Where rows have no common direction that saves nothing, and is left out.
// What rows lose that are rounded too, divided by their sums (Strip::products), is not in it.
#pragma once

#include "cuda/scores.hpp"

namespace nearfar {
inline namespace device {

/// Of a block of weights: how many sides are summed (0: none, 1: rows, 2: columns too), then [row][half a tile of
/// columns] and [column][tile of rows].
template <class T>
struct Rounding {
  T* data = nullptr;

  static constexpr int64_t kHalf = kPadRows / 2;

  static int64_t size(int64_t pairs) { return 1 + pairs / kHalf + pairs / kPadRows; }
  NEARFAR_DEVICE int sides() const { return static_cast<int>(*data); }
  NEARFAR_DEVICE T* of_rows() const { return data + 1; }
  NEARFAR_DEVICE T* of_columns(const Block& b) const { return of_rows() + b.rows * (b.columns / kHalf); }

  /// Half of the columns of a tile of the block: its weights, which are replaced by what they lose.
  template <class P>
  NEARFAR_DEVICE void sum_half(const Fragment<P>& f, const Block& b, int half) const {
    const int count = sides();
    if (count == 0) return;
    float sums[P::kRows] = {};
    NEARFAR_UNROLL
    for (int i = 0; i < P::kRows; ++i) NEARFAR_UNROLL
    for (int k = 0; k < P::kCols / 2; ++k) {
      float& value = f(i, half * (P::kCols / 2) + k);
      value -= widen(narrow<typename P::Element>(value));
      sums[i] += value;
    }
    const int across = static_cast<int>(b.columns / kHalf), down = static_cast<int>(b.rows / P::kM);
    T* rows = of_rows() + f.i0 * across + f.j0 / kHalf + half;
    place_rows<P>(sums, [&](int i, float sum) { rows[int64_t(i) * across] = sum; });
    if (count == 1) return;
    T* columns = of_columns(b) + f.j0 * down + f.i0 / P::kM;
    sum_columns<2>(f, [&](int j, float sum) { columns[int64_t(j) * down] = sum; }, half);
  }
};

/// About the means of both sets, as they are packed: of some rows, evenly spaced, since any common point will do.
/// `sides` are summed where rows of a set have a direction in common; elsewhere rounding costs no more than that of the
/// returned gradient does. One block.
template <class T, class E>
struct MeanRows {
  static constexpr int64_t kSamples = 32;  // one after the other: more would take longer than a tile
  static constexpr double kLean = 0.75;    // of the mean square: about the mean cosine of two rows
  Packed<T, E> sets[2];
  T* means[2];
  int sides;
  Rounding<T> rounding;

  NEARFAR_DEVICE void operator()() const {
    bool lean = false;
    NEARFAR_ROLLED
    for (int s = 0; s < 2; ++s) {
      const Packed<T, E>& set = sets[s];
      const int64_t step = set.n > kSamples ? set.n / kSamples : 1;
      double of_mean = 0, of_rows = 0;
      for (int64_t k = cuda::thread_index(); k < set.d; k += cuda::kThreads) {
        double sum = 0, squares = 0;
        NEARFAR_UNROLL_4
        for (int64_t i = 0; i < set.n; i += step) {
          const double value = static_cast<double>(widen(*set.at(i, k)));
          sum += value, squares += value * value;
        }
        const double count = static_cast<double>((set.n + step - 1) / step), mean = sum / count;
        means[s][k] = static_cast<T>(mean);
        of_mean += mean * mean;
        of_rows += squares / count;
      }
      of_mean = block_sum(of_mean), of_rows = block_sum(of_rows);
      lean |= of_mean > kLean * of_rows;
    }
    if (cuda::thread_index() == 0) *rounding.data = static_cast<T>(lean ? sides : 0);
  }
};

/// The mean of what the rows of a tile are still to be multiplied by, of float16 also by what takes the largest below
/// 2^order. A warp a tile; there are `rows` in all.
template <class T>
struct TileWeights {
  const T* of_rows;
  const double* largest;  // null: 1
  int order;
  int64_t rows;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const int64_t tile = cuda::global_warp(), left = rows - tile * kPadRows;
    if (left <= 0) return;
    double sum = 0;
    for (int64_t i = cuda::lane_index(); i < kPadRows; i += cuda::kWarp)
      sum += static_cast<double>(of_rows[tile * kPadRows + i]);
    sum = cuda::warp_sum(sum) / static_cast<double>(left < kPadRows ? left : kPadRows);
    if (cuda::lane_index() == 0) out[tile] = static_cast<T>(largest ? sum * power_below(*largest, order) : sum);
  }
};

/// What rounding took from the rows and then the columns of a block, a warp each; 0 where it was not summed.
template <class T>
struct MergeRounding {
  Rounding<T> rounding;
  Block block;
  const T* of_tiles;  // what those of rows are still to be multiplied by; null: 1
  T *rows, *columns;  // columns null: not wanted

  NEARFAR_DEVICE void operator()() const {
    const int64_t line = cuda::global_warp(), column = line - block.rows;
    if (column >= (columns ? block.columns : 0)) return;
    const bool down = column >= 0;
    const int64_t count = down ? block.rows / kPadRows : block.columns / Rounding<T>::kHalf;
    const T* parts = down ? rounding.of_columns(block) + column * count : rounding.of_rows() + line * count;
    T sum = 0;
    if (rounding.sides() > 0)
      for (int64_t tile = cuda::lane_index(); tile < count; tile += cuda::kWarp)
        sum += down && of_tiles ? parts[tile] * of_tiles[tile] : parts[tile];
    sum = cuda::warp_sum(sum);
    if (cuda::lane_index() == 0) (down ? columns[column] : rows[line]) = sum;
  }
  static void launch(cuda::Context& c, const MergeRounding& step) {
    c.launch_warps(step.block.rows + (step.columns ? step.block.columns : 0), step);
  }
};

/// These numbers times the mean of the other rows, which join a product.
template <class T>
struct MeanTimes {
  const T *times = nullptr, *mean = nullptr;
  NEARFAR_DEVICE T of(int64_t i) const { return times ? times[i] : T(0); }
  /// To a tile of (rows, d).
  template <class P>
  NEARFAR_DEVICE void add(const Fragment<P>& f, int64_t rows, int64_t d) const {
    if (!times) return;
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      const float own = f.i(a) < rows ? of(f.i(a)) : 0.0f;
      if (!cuda::ballot(own != 0)) continue;
      NEARFAR_UNROLL
      for (int b = 0; b < P::kCols; ++b)
        if (f.j(b) < d) f(a, b) += own * mean[f.j(b)];
    }
  }
};

}  // namespace device
}  // namespace nearfar
