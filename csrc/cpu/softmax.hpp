// Softmax over pairs, what its operations share: the log-sum-exps of rows and columns of blocks of scores, and weights
// from known normalisers. `ops/softmax.cpp` says what they are for.
#pragma once

#include "cpu/mask.hpp"
#include "cpu/strip.hpp"
#include "pairwise/reduce.hpp"

namespace nearfar {
namespace {

template <class T>
NEARFAR_INLINE Vec<T> finite_or_zero(Vec<T> m) {
  return select(m == splat<T>(static_cast<T>(-kInfinity)), Vec<T>{}, m);
}

/// A base that serves rows and columns alike: for unit rows no score exceeds scale, and at moderate temperatures none
/// is so far below it that its exponential is lost. Then one exponential a pair is enough where else rows and columns
/// each need their own. 0: there is none.
inline double common_base(double scale, bool normalize) {
  constexpr double kSafeRange = 60;
  return normalize && 2 * scale <= kSafeRange ? scale : 0;
}

/// Log-sum-exp of rows, and of columns where COLUMNS; with `keep`, scores become exp(s - m) of the chunk's row maximum
/// m, ready to be weights. With COLUMNS and a common base they become exp(s - base) in any case.
template <class T, bool COLUMNS>
struct LseCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;

  LseCell(const Operands<T>& operands, const Mask<T>& mask, bool keep_weights, double base)
      : o(operands),
        mask_(mask),
        keep(keep_weights),
        common(static_cast<T>(base)),
        max(o.chunks.count * P::kStripRows),
        sum(o.chunks.count * P::kStripRows),
        factor_(keep ? o.chunks.count * P::kStripRows : 0) {
    if (!COLUMNS) return;
    const int64_t size = o.chunks.tiles * P::MR * P::NR;
    column_max = Buffer<T>(size);
    column_sum = Buffer<T>(size);
    for (int64_t k = 0; k < size; ++k)
      column_max[k] = common > 0 ? common : static_cast<T>(-kInfinity), column_sum[k] = 0;
  }

  void map(const Block<T>& b) {
    mask_.apply(b);
    if (COLUMNS && common > 0) return both(b);
    if (COLUMNS) columns(b);
    // Of few rows nobody looks at the lanes behind them.
    const int64_t vectors = o.packed() ? P::kVectors : ceil_div(o.x.n(), kLanes<T>);
    for (int64_t p = 0; p < b.panels; ++p) {
      T* s = b.panel(p);
      for (int v = 0; v < vectors; ++v, s += kLanes<T>) {
        Vec<T> top = splat<T>(common > 0 ? common : static_cast<T>(-kInfinity)), total = Vec<T>{};
        for (int64_t j = 0; !(common > 0) && j < b.columns; ++j) top = vmax(load(s + j * P::NR), top);
        const Vec<T> base = finite_or_zero<T>(top);
        if (keep) {
          for (int64_t j = 0; j < b.columns; ++j) {
            const Vec<T> e = exp_flush(load(s + j * P::NR) - base);
            total += e;
            store(s + j * P::NR, e);
          }
        } else {
          for (int64_t j = 0; j < b.columns; ++j) total += exp_flush(load(s + j * P::NR) - base);
        }
        const int64_t at = b.chunk * P::kStripRows + p * P::NR + v * kLanes<T>;
        store(&max[at], base);
        store(&sum[at], total);
      }
    }
  }

  /// Rows and columns from one exponential.
  void both(const Block<T>& b) {
    const Vec<T> base = splat<T>(common);
    for (int64_t p = 0; p < b.panels; ++p)
      for (int v = 0; v < P::kVectors; ++v) {
        T* s = b.panel(p) + v * kLanes<T>;
        T* column = &column_sum[b.column * P::NR + v * kLanes<T>];
        Vec<T> total = Vec<T>{};
        for (int64_t j = 0; j < b.columns; ++j) {
          const Vec<T> e = exp_flush(load(s + j * P::NR) - base);
          total += e;
          store(s + j * P::NR, e);
          store(column + j * P::NR, load(column + j * P::NR) + e);
        }
        const int64_t at = b.chunk * P::kStripRows + p * P::NR + v * kLanes<T>;
        store(&max[at], base);
        store(&sum[at], total);
      }
  }

  /// Columns keep one state per lane; lanes are merged once, at the end.
  void columns(const Block<T>& b) {
    for (int64_t j = 0; j < b.columns; ++j)
      for (int v = 0; v < P::kVectors; ++v) {
        const int64_t at = (b.column + j) * P::NR + v * kLanes<T>, within = j * P::NR + v * kLanes<T>;
        const Vec<T> before = load(&column_max[at]);
        Vec<T> top = before;
        for (int64_t p = 0; p < b.panels; ++p) top = vmax(load(b.panel(p) + within), top);
        const Vec<T> base = finite_or_zero<T>(top);
        Vec<T> total = load(&column_sum[at]) * exp_flush(before - base);
        for (int64_t p = 0; p < b.panels; ++p) total += exp_flush(load(b.panel(p) + within) - base);
        store(&column_max[at], top);
        store(&column_sum[at], total);
      }
  }

  void close(int64_t row, int64_t rows, int64_t chunks) {
    for (int64_t i = 0; i < rows; ++i) {
      LogSumExp state = rows_state[row + i];
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = c * P::kStripRows + i;
        state.add(static_cast<double>(max[at]), static_cast<double>(sum[at]));
      }
      rows_state[row + i] = state;
      if (!keep) continue;
      if (positive) state.add(positive[row + i], 1);
      const double lse = state.value(), w = weights ? static_cast<double>(weights[row + i]) : weight;
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = c * P::kStripRows + i;
        factor_[at] = static_cast<T>(sum[at] == 0 ? 0.0 : w * std::exp(static_cast<double>(max[at]) - lse));
      }
    }
    if (keep)
      for (int64_t c = 0; c < chunks; ++c)
        for (int64_t i = rows; i < P::kStripRows; ++i) factor_[c * P::kStripRows + i] = 0;
  }
  const T* factor(int64_t chunk) const { return factor_.get() + chunk * P::kStripRows; }

  LogSumExp column_state(int64_t j) const {
    LogSumExp state;
    for (int lane = 0; lane < P::NR; ++lane)
      state.add(static_cast<double>(column_max[j * P::NR + lane]), static_cast<double>(column_sum[j * P::NR + lane]));
    return state;
  }

  const Operands<T>& o;
  const Mask<T>& mask_;
  bool keep;
  T common;
  Buffer<T> max, sum, factor_;
  Buffer<T> column_max, column_sum;
  LogSumExp* rows_state = nullptr;
  const double* positive = nullptr;  // scores that are in the denominator but not in rows_state
  const T* weights = nullptr;
  double weight = 0;
};

/// Weights from known normalisers: W_ij = u_i e^{s_ij - a_i} + v_j e^{s_ij - b_j}; with a common base in a and b,
/// W_ij = (u_i + v_j) e^{s_ij - base}, where the exponential may be there already. With CLASSES less the pull (c_i +
/// c_j) of two rows of a class: in a tight one both are nearly equal, and what is left keeps its digits only where they
/// are subtracted before the product.
template <class T, bool COLUMNS, bool CLASSES>
struct WeightCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;

  void map(const Block<T>& b) {
    if (!scored) mask_.apply(b);
    const bool exponentials = scored && common;
    for (int64_t p = 0; p < b.panels; ++p) {
      T* s = b.panel(p);
      const int64_t row = b.row + p * P::NR;
      for (int v = 0; v < P::kVectors; ++v) {
        const Vec<T> a = load(&row_lse[row + v * kLanes<T>]), u = load(&row_weight[row + v * kLanes<T>]);
        Vec<T> pull{};
        IVec<T> own{};
        if (CLASSES) {
          pull = load(&class_pull[row + v * kLanes<T>]);
          __builtin_memcpy(&own, classes + row + v * kLanes<T>, sizeof own);
        }
        for (int64_t j = 0; j < b.columns; ++j) {
          T* place = s + j * P::NR + v * kLanes<T>;
          const Vec<T> score = load(place);
          const Vec<T> e = exponentials ? score : exp_flush(score - a);
          const Vec<T> other = COLUMNS ? splat<T>(column_weight[b.column + j]) : Vec<T>{};
          Vec<T> w = (u + other) * e;
          if (COLUMNS && !common) w = u * e + other * exp_flush(score - splat<T>(column_lse[b.column + j]));
          if (CLASSES) {
            const IVec<T> alike = own == isplat<T>(classes[b.column + j]);
            const IVec<T> there = score > splat<T>(static_cast<T>(exponentials ? 0 : -kInfinity));
            w -= select(alike & there, pull + splat<T>(class_pull[b.column + j]), Vec<T>{});
          }
          store(place, w);
        }
      }
    }
  }
  void close(int64_t, int64_t, int64_t) {}
  const T* factor(int64_t) const { return nullptr; }

  const Mask<T>& mask_;
  const T *row_lse, *row_weight, *column_lse, *column_weight;  // padded to whole strips and tiles
  bool common;
  bool scored = false;                // masked scores, or their exponentials, are there
  const IntOf<T>* classes = nullptr;  // and these
  const T* class_pull = nullptr;
};

}  // namespace
}  // namespace nearfar
