// Gradients by strips: a block of weights W, bounded in size, and both products with it.
//
//   dX += W Y      dY += W^T X         for distances  dx_i = sum_j w_ij (x_i - y_j), and the same of y
//
// An operation writes W (an epilogue of scores, or a kernel over the block), then calls `products`. dX is cut along its
// depth where its tiles are few and merged in order; dY has one owner for every number. So results are bitwise the same
// every time.
#pragma once

#include <algorithm>
#include <utility>

#include "cuda/finish.hpp"
#include "cuda/weights.hpp"
#include "cuda/wgmma_weights.hpp"

namespace nearfar {
inline namespace device {

/// The largest |value| that is finite, by one block.
template <class V>
struct LargestOf {
  const V* values;
  int64_t count;
  double* out;
  bool joins;  // what lies there counts too
  NEARFAR_DEVICE void operator()() const {
    double most = 0;
    NEARFAR_UNROLL_4
    for (int64_t k = cuda::thread_index(); k < count; k += cuda::kThreads) {
      const double value = fabs(static_cast<double>(values[k]));
      most = value > most && value < infinity<double>() ? value : most;
    }
    most = block_largest(most);
    if (cuda::thread_index() == 0) *out = joins && *out > most ? *out : most;
  }
};
/// `count` numbers on the device.
template <class V>
struct Numbers {
  const V* values;
  int64_t count;
};

/// Factors of rows, times what takes numbers up to times * *largest below 2^order.
template <class T>
struct FitFactors {
  const T* factor;
  int64_t count;
  double times;
  const double* largest;
  int order;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const int64_t k = cuda::global_thread();
    if (k < count) out[k] = factor[k] * power_below(largest ? times * *largest : times, order);
  }
};

/// Parts of a product whose depth was cut: out[split][i][k].
template <class T>
struct StoreParts {
  static constexpr bool kDistances = false;
  T* out;
  int64_t rows, d;
  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t split) const {
    if constexpr (is_product<P>)
      return put_rows<false>(f, out + split * rows * d, rows, d, [](int64_t) { return 1.0f; });
    f.for_each([&](int64_t i, int64_t k, T value) {
      if (i < rows && k < d) out[(split * rows + i) * d + k] = value;
    });
  }
};

/// 1 / factor; a row without one stands for zero and takes no part.
template <class T>
NEARFAR_DEVICE T reciprocal(const T* factor, int64_t i) {
  return !factor ? T(1) : factor[i] == 0 ? T(0) : 1 / factor[i];
}

/// out_i += sum of the parts, or with sums out_i += sums_i * own_i - sum of the parts. As many warps a row as it has
/// vectors for their lanes.
template <class T>
struct MergeParts {
  static constexpr int64_t kSpan = cuda::kWarp * Wide<T>::kWide;
  const T* parts;
  int64_t splits, padded, rows, d;
  const T* sums;  // null: a plain product
  const T* own;   // packed rows
  int64_t pitch;
  T* out;
  const T* factor = nullptr;
  const T* weight = nullptr;  // of row i; null: 1
  MeanTimes<T> more{};        // to the product
  NEARFAR_DEVICE void operator()() const {
    const int64_t across = (d + kSpan - 1) / kSpan, i = cuda::global_warp() / across;
    if (i >= rows) return;
    const int64_t begin = (cuda::global_warp() - i * across) * kSpan, end = begin + kSpan < d ? begin + kSpan : d;
    const bool wide = d % Wide<T>::kWide == 0 && aligned(parts) && aligned(out) && (!own || aligned(own)) &&
                      (!more.mean || aligned(more.mean));
    wide ? merge(Wide<T>{}, i, begin, end) : merge(Single<T>{}, i, begin, end);
  }
  static void launch(cuda::Context& c, const MergeParts& step) {
    c.launch_warps(step.rows * ceil_div(step.d, kSpan), step);
  }

 private:
  template <class Way>
  NEARFAR_DEVICE void merge(Way, int64_t i, int64_t begin, int64_t end) const {
    constexpr int W = Way::kWide;
    const T by_row = sums ? sums[i] : reciprocal(factor, i), weighed = weight ? weight[i] : T(1), times = more.of(i);
    NEARFAR_ROLLED
    for (int64_t k = begin + cuda::lane_index() * W; k < end; k += cuda::kWarp * W) {
      Piece<T, W> total = load_piece<W>(out + i * d + k), sum{};
      NEARFAR_UNROLL_4
      for (int64_t split = 0; split < splits; ++split) {
        const Piece<T, W> part = load_piece<W>(parts + (split * padded + i) * d + k);
        NEARFAR_UNROLL
        for (int e = 0; e < W; ++e) sum[e] += part[e];
      }
      if (times != 0) {
        const Piece<T, W> mean = load_piece<W>(more.mean + k);
        NEARFAR_UNROLL
        for (int e = 0; e < W; ++e) sum[e] += times * mean[e];
      }
      const Piece<T, W> of_row = sums ? load_piece<W>(own + i * pitch + k) : Piece<T, W>{};
      NEARFAR_UNROLL
      for (int e = 0; e < W; ++e) total[e] += sums ? by_row * of_row[e] - sum[e] : sum[e] * by_row * weighed;
      store_piece(out + i * d + k, total);
    }
  }
};

/// Blocked rows times a number each, and of float16 times what takes the largest of these numbers below 2^order. A
/// vector of them each thread.
template <class T, class E>
struct WeighRows {
  Blocked rows;
  const T* weight;
  const double* largest;  // null: 1
  int order;
  int64_t count;  // of numbers
  uint16_t* out;
  NEARFAR_DEVICE void operator()() const {
    constexpr int W = Wide<E>::kWide;
    const int64_t at = cuda::global_thread() * W, block = at / Blocked::kBlock,
                  line = at % Blocked::kBlock / Blocked::kColumns;
    if (at >= count) return;
    const Vector<uint32_t> held = Wide<E>::load(reinterpret_cast<const E*>(rows.data) + at);
    float factor = static_cast<float>(weight[block / rows.across * Blocked::kRows + line]);
    if (largest) factor *= power_below(*largest, order);
    Piece<float, W> own;
    NEARFAR_UNROLL
    for (int e = 0; e < W; ++e) own[e] = widen(Wide<E>::get(held, e)) * factor;
    store_piece(reinterpret_cast<E*>(out) + at, own);
  }
};

/// The same where the depth is not cut, from the tile.
template <class T>
struct AddRows {
  static constexpr bool kDistances = false;
  T* out;
  int64_t rows, d;
  const T* sums;
  const T* own;
  int64_t pitch;
  const T* factor = nullptr;
  MeanTimes<T> more{};  // to the product of blocked rows
  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    if constexpr (is_product<P>) more.add(f, rows, d);
    // Of distances, what is not the product is added apart: MergeParts, without parts.
    if constexpr (is_product<P>)
      return put_rows<true>(f, out, rows, d, [&](int64_t i) { return sums ? T(-1) : reciprocal(factor, i); });
    f.for_each([&](int64_t i, int64_t k, T value) {
      if (i < rows && k < d)
        out[i * d + k] += sums ? sums[i] * own[i * pitch + k] - value : value * reciprocal(factor, i);
    });
  }
};

/// Weights times packed rows, in parts of the depth; and the transpose of weights times packed rows, added to out. One
/// place for the kernels of both, products.cu.
template <class T, class E>
void multiply_parts(cuda::Context& c, const Plan& plan, const Operand<T, true>& w, const Operand<E, false>& rows,
                    const Block& b, int64_t d, T* parts);
template <class T, class E>
void multiply_transposed(cuda::Context& c, const Plan& plan, const Operand<T, false>& w, const Operand<E, false>& rows,
                         const Block& b, int64_t d, const AddRows<T>& add);

/// The same of blocked weights and rows: b.columns (or, transposed, b.rows) is the depth.
template <class E>
void multiply_blocked(cuda::Context& c, const Plan& plan, const Blocked& w, const Blocked& rows, const Block& b,
                      int64_t d, float* parts);
template <class E>
void multiply_blocked_transposed(cuda::Context& c, const Plan& plan, const Blocked& w, const Blocked& rows,
                                 const Block& b, int64_t d, const AddRows<float>& add);

/// The same of float32 weights, either way about, and rows in two pieces.
template <class W, class Epilogue>
void multiply_split(cuda::Context& c, const Plan& plan, const W& w, const SplitRows& rows, int64_t lines, int64_t depth,
                    int64_t d, const Epilogue& epilogue);

/// What the caller gets back from a strip: rows and columns of its blocks, by the shape alone.
struct StripShape {
  int64_t rows, columns;
  /// whole: a strip must hold whole rows.
  static StripShape of(int64_t n, int64_t m, int64_t budget, bool whole) {
    StripShape s{round_up(n, kPadRows), round_up(m, kPadRows)};
    constexpr int64_t kRows = 1024;  // enough for both products to fill the device
    if (!whole && s.columns * kRows > budget) s.columns = at_least_one(budget / kRows);
    if (s.columns > 0 && s.rows * s.columns > budget) s.rows = at_least_one(budget / s.columns);
    return s;
  }
  /// f(block) for all of (rows, columns), whole tiles, row by row.
  template <class F>
  void for_blocks(int64_t all_rows, int64_t all_columns, F f) const {
    for (int64_t row = 0; row < all_rows; row += rows)
      for (int64_t column = 0; column < all_columns; column += columns)
        f(Block{row, all_rows - row < rows ? all_rows - row : rows, column,
                all_columns - column < columns ? all_columns - column : columns});
  }
  static int64_t at_least_one(int64_t count) { return count < kPadRows ? kPadRows : count / kPadRows * kPadRows; }
};

/// Blocks whose numbers, so many for every row of a tile of 64 columns or more, take the memory of a strip of weights.
template <class T, class E>
StripShape tile_blocks(const cuda::Context& c, const Pairs<T, E>& pairs, int64_t numbers) {
  return StripShape::of(pairs.x.n, pairs.y.n, c.strip_bytes / static_cast<int64_t>(sizeof(T)) * 64 / numbers, false);
}
/// How many tiles a row has in one of them, at most.
inline int64_t tiles_of(const StripShape& shape) { return ceil_div(shape.columns, 64); }

/// f(block) for all pairs, row by row, where nothing is stored but `numbers` for every row of a tile.
template <class T, class E, class F>
void for_tile_blocks(const cuda::Context& c, const Pairs<T, E>& pairs, int64_t numbers, F f) {
  tile_blocks(c, pairs, numbers).for_blocks(pairs.x.padded, pairs.y.padded, f);
}

template <class T, class E>
class Strip {
 public:
  /// stored: is there anything to store? dx null: no products. dy null: no product for y.
  Strip(cuda::Context& c, const Pairs<T, E>& pairs, bool whole_rows, bool stored, T* dx, T* dy)
      : c_(c), pairs_(pairs), dx_(dx), dy_(dy) {
    const bool blocked = pairs.blocked();
    shape = StripShape::of(pairs.x.n, pairs.y.n, c.strip_bytes / (blocked ? sizeof(E) : sizeof(T)), whole_rows);
    if (!stored) return;
    const int64_t size = shape.rows * shape.columns;
    if (blocked) {
      weights_.blocks = {c.take<uint16_t>(size), shape.columns / Blocked::kColumns};
      weights_.x_factor = pairs.x.factor;
      weights_.y_factor = y_divisor_ = pairs.y.factor;
    } else {
      weights_.w = c.take<T>(size);
    }
    weights_.near = pairs.scores.distance && dx ? c.take<uint32_t>(size / 32) : nullptr;
    weights_.pitch = shape.columns;
    if (!dx) return;
    if constexpr (std::is_same_v<E, float>)
      if (!pairs.scores.direct && splits_rows(c, pairs.x.n, pairs.y.n, pairs.x.d)) {
        split();
        return;
      }
    if (blocked && whole_rows && dy) {
      weighed_rows_ = {c.take<uint16_t>(shape.rows * pairs.x.pitch), pairs.x.pitch / Blocked::kColumns};
      if (std::is_same_v<E, F16>) largest_row_ = c.take<double>(1), weighed_divisor_ = c.take<T>(shape.columns);
    }
    plan_ = blocked ? plan_blocked_product<E>(c, kProduct, shape.rows, pairs.x.d, shape.columns, true)
                    : plan<E>(c, kProduct, shape.rows, pairs.x.d, shape.columns, true);
    parts_ = c.take<T>(plan_.splits * shape.rows * pairs.x.d);
    row_sums_ = c.take<T>(shape.rows);
    column_sums_ = c.take<T>(shape.columns);
    if constexpr (sizeof(E) == 2) {
      if (!blocked) return;
      weights_.rounding = {c.take<T>(Rounding<T>::size(size))};
      tile_weights_ = c.take<T>(shape.rows / kPadRows);
      mean_x_ = c.take<T>(pairs.x.d), mean_y_ = c.take<T>(pairs.y.d);
      c.launch(1, MeanRows<T, E>{{pairs.x, pairs.y}, {mean_x_, mean_y_}, dy ? 2 : 1, weights_.rounding});
    }
  }

  /// No weight of a pair is further from 0 than `times` the largest of numbers on the device; without these, than
  /// `times`. To be said before blocked weights are stored.
  ///
  /// Those of float16 lie below 2^15, the largest near it: what is 2^-29 of it still has all its digits. A power of two
  /// does that, in the factor of x with which weights are stored and by which both products are divided. Unit rows have
  /// factors from 2^-8 to 2^-7 already (Pack), and numbers up to 2^8, which leaves 2^7 for their own weights.
  template <class... V>
  void fit(double times, const Numbers<V>&... numbers) {
    fitted_ = true;
    if (!std::is_same_v<E, F16> || !weights_.blocks.data) return;
    double* largest = sizeof...(V) ? c_.take<double>(1) : nullptr;
    bool joins = false;
    (c_.launch(1, LargestOf<V>{numbers.values, numbers.count, largest, std::exchange(joins, true)}), ...);
    const int order = kWeightOrder + (pairs_.scores.x.inverse ? 7 : 0) + (pairs_.scores.y.inverse ? 7 : 0);
    const auto fitted = [&](const Packed<T, E>& rows) {
      T* out = c_.take<T>(rows.padded);
      c_.launch_threads(rows.padded, FitFactors<T>{rows.factor, rows.padded, times, largest, order, out});
      return out;
    };
    weights_.x_factor = fitted(pairs_.x);
    y_divisor_ = pairs_.x.factor == pairs_.y.factor ? weights_.x_factor : fitted(pairs_.y);
  }

  /// f(weights of a block, empty so far) for every block, row by row.
  template <class F>
  void for_blocks(F f) {
    shape.for_blocks(pairs_.x.padded, pairs_.y.padded, [&](const Block& block) { f(open(block)); });
  }
  Weights<T> open(const Block& block) {
    if (weights_.blocks.data && !fitted_) throw std::logic_error("blocked weights without a bound");
    Weights<T> weights = weights_;
    weights.block = block;
    return weights;
  }
  void clear_near(const Weights<T>& weights) {
    const int64_t words = weights.block.rows * weights.pitch / 32;
    if (weights.near) c_.launch_threads(words, Fill<uint32_t>{weights.near, words, 0});
  }

  /// Weights that the epilogue of a product has left, times both sets. dy null: only dX. of_rows: what row i of blocked
  /// weights is still to be multiplied by, where a strip holds whole rows; null: nothing.
  void products(const Weights<T>& weights, const T* of_rows = nullptr) {
    const Block& b = weights.block;
    const bool distance = pairs_.scores.distance;
    const int64_t d = pairs_.x.d;
    if constexpr (sizeof(E) == 2)
      if (pairs_.blocked()) return blocked_products(weights, offset(of_rows, weights.block.row));
    if (distance) {
      if (dy_) c_.launch_warps(b.columns, NearColumns<T>{weights, pairs_.scores.x, pairs_.scores.y, dy_});
      c_.launch_warps(b.rows, NearRows<T>{weights, pairs_.scores.x, pairs_.scores.y, dx_, row_sums_});
      if (dy_) c_.launch_threads(b.columns, ColumnSums<T>{weights, column_sums_});
    }
    if constexpr (std::is_same_v<E, float>)
      if (of_y_.factor) return split_products(weights);
    {
      const Operand<T, true> w{weights.w, weights.pitch, factor(pairs_.y, b.column)};
      const Operand<E, false> rows{pairs_.y.data + b.column * pairs_.y.pitch, pairs_.y.pitch};
      multiply_parts<T, E>(c_, plan_, w, rows, b, d, parts_);
      const int64_t valid = b.rows < pairs_.x.n - b.row ? b.rows : pairs_.x.n - b.row;
      MergeParts<T>::launch(c_, {parts_, plan_.splits, b.rows, valid, d, distance ? row_sums_ : nullptr,
                                 own(pairs_.x, b.row), pairs_.x.pitch, dx_ + b.row * d});
    }
    if (!dy_) return;
    const Plan down = plan<E>(c_, kTransposedProduct, b.columns, d, b.rows, false);
    const Operand<T, false> w{weights.w, weights.pitch, factor(pairs_.x, b.row)};
    const Operand<E, false> rows{pairs_.x.data + b.row * pairs_.x.pitch, pairs_.x.pitch};
    const int64_t valid = b.columns < pairs_.y.n - b.column ? b.columns : pairs_.y.n - b.column;
    multiply_transposed<T, E>(c_, down, w, rows, b, d,
                              AddRows<T>{dy_ + b.column * d, valid, d, distance ? column_sums_ : nullptr,
                                         own(pairs_.y, b.column), pairs_.y.pitch});
  }

  StripShape shape;

 private:
  void split() {
    const int64_t d = pairs_.x.d;
    const auto pieces = [&](const Packed<T, E>& rows) { return split_rows(c_, rows.data, rows.padded, rows.pitch); };
    plan_ = plan_split_product(c_, kProduct, shape.rows, d, shape.columns);
    row_sums_ = c_.take<T>(shape.rows);
    of_y_ = pieces(pairs_.y);
    int64_t parts = plan_.splits * shape.rows;
    if (dy_) {
      down_ = plan_split_product(c_, kTransposedProduct, shape.columns, d, shape.rows);
      column_sums_ = c_.take<T>(shape.columns);
      of_x_ = pairs_.x.data == pairs_.y.data ? of_y_ : pieces(pairs_.x);
      parts = std::max(parts, down_.splits * shape.columns);
    }
    parts_ = c_.take<T>(parts * d);
  }
  void split_products(const Weights<T>& weights) {
    const Block& b = weights.block;
    const int64_t rows = std::min(b.rows, pairs_.x.n - b.row), columns = std::min(b.columns, pairs_.y.n - b.column);
    add_split_product(plan_, Operand<T, true>{weights.w, weights.pitch}, of_y_.from(b.column / kPadRows), b.rows,
                      b.columns, rows, row_sums_, own(pairs_.x, b.row), dx_ + b.row * pairs_.x.d);
    if (!dy_) return;
    add_split_product(down_, Operand<T, false>{weights.w, weights.pitch}, of_x_.from(b.row / kPadRows), b.columns,
                      b.rows, columns, column_sums_, own(pairs_.y, b.column), dy_ + b.column * pairs_.y.d);
  }
  /// Of `lines` lines, of which `valid` are in the set; `sums` of their weights, for distances, with their own rows.
  template <class W>
  void add_split_product(Plan plan, const W& w, const SplitRows& rows, int64_t lines, int64_t depth, int64_t valid,
                         const T* sums, const T* own, T* out) {
    const int64_t d = pairs_.x.d, pitch = pairs_.x.pitch;
    if (!pairs_.scores.distance) sums = nullptr;
    plan.splits = std::min(plan.splits, depth / Blocked::kColumns);
    const bool merges = plan.splits > 1;
    if (merges) {
      multiply_split(c_, plan, w, rows, lines, depth, d, StoreParts<T>{parts_, lines, d});
    } else {
      multiply_split(c_, plan, w, rows, lines, depth, d, AddRows<T>{out, valid, d, sums, own, pitch});
    }
    if (merges || sums)
      MergeParts<T>::launch(c_, {parts_, merges ? plan.splits : 0, lines, valid, d, sums, own, pitch, out});
  }

  void blocked_products(const Weights<T>& weights, const T* of_rows) {
    const Block& b = weights.block;
    const int64_t d = pairs_.x.d;
    const int64_t rows = b.rows < pairs_.x.n - b.row ? b.rows : pairs_.x.n - b.row;
    const int64_t columns = b.columns < pairs_.y.n - b.column ? b.columns : pairs_.y.n - b.column;
    Plan across = plan_;  // every part has a step at least, also in a narrow last block
    across.splits = std::min(plan_.splits, b.columns / Blocked::kColumns);
    multiply_blocked<E>(c_, across, weights.blocks, pairs_.y.blocks(b.column / Blocked::kRows), b, d, parts_);
    if (of_rows && dy_) {
      if (largest_row_) c_.launch(1, LargestOf<T>{of_rows, b.rows, largest_row_, false});
      c_.launch_warps(b.rows / kPadRows, TileWeights<T>{of_rows, largest_row_, kRowOrder, rows, tile_weights_});
    }
    MergeRounding<T>::launch(
        c_, {weights.rounding, b, of_rows ? tile_weights_ : nullptr, row_sums_, dy_ ? column_sums_ : nullptr});
    const MeanTimes<T> lost_of_rows{row_sums_, mean_y_}, lost_of_columns{column_sums_, mean_x_};
    MergeParts<T>::launch(c_, {parts_, across.splits, b.rows, rows, d, nullptr, nullptr, 0, dx_ + b.row * d,
                               offset(weights.x_factor, b.row), of_rows, lost_of_rows});
    if (!dy_) return;
    Blocked own = pairs_.x.blocks(b.row / Blocked::kRows);
    const T* divisor = offset(y_divisor_, b.column);
    if (of_rows) {
      const int64_t count = b.rows * pairs_.x.pitch;
      if (largest_row_) {
        c_.launch_threads(b.columns, FitFactors<T>{divisor, b.columns, 1, largest_row_, kRowOrder, weighed_divisor_});
        divisor = weighed_divisor_;
      }
      c_.launch_threads(count / Wide<E>::kWide,
                        WeighRows<T, E>{own, of_rows, largest_row_, kRowOrder, count, weighed_rows_.data});
      own = weighed_rows_;
    }
    const Plan down = plan_blocked_product<E>(c_, kTransposedProduct, b.columns, d, b.rows, false);
    multiply_blocked_transposed<E>(
        c_, down, weights.blocks, own, b, d,
        AddRows<T>{dy_ + b.column * d, columns, d, nullptr, nullptr, 0, divisor, lost_of_columns});
  }
  static constexpr int kWeightOrder = 15, kRowOrder = 7;
  static constexpr const char *kProduct = "weights times rows", *kTransposedProduct = "weights' transpose times rows";
  static const T* offset(const T* factor, int64_t row) { return factor ? factor + row : nullptr; }

  static const float* factor(const Packed<T, E>& packed, int64_t row) {
    if constexpr (sizeof(T) == 4) return packed.factor ? packed.factor + row : nullptr;
    return nullptr;
  }
  static const T* own(const Packed<T, E>& packed, int64_t row) {
    if constexpr (std::is_same_v<T, E>) return packed.data + row * packed.pitch;
    return nullptr;
  }

  cuda::Context& c_;
  const Pairs<T, E>& pairs_;
  T *dx_, *dy_;
  Weights<T> weights_{};
  bool fitted_ = false;
  Blocked weighed_rows_;
  const T* y_divisor_ = nullptr;  // of blocked rows: what the product for row j of y is divided by
  T* weighed_divisor_ = nullptr;  // the same for rows of x times a number each, of a strip's columns
  double* largest_row_ = nullptr;
  SplitRows of_x_, of_y_;  // float32 on Hopper
  Plan plan_{}, down_{};
  T *parts_ = nullptr, *row_sums_ = nullptr, *column_sums_ = nullptr;
  T *mean_x_ = nullptr, *mean_y_ = nullptr, *tile_weights_ = nullptr;  // of blocked rows: rounding.hpp
};

}  // namespace device
}  // namespace nearfar
