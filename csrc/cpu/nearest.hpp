// The nearest column of every row: arg-min over a strip of rows, exact although it is screened.
//
// Columns are compared by t = 2 <x, y> - |y|^2 (the expansion without |x|^2, which is the same for all of them), and
// the best and the second-best t are kept, each with how far rounding may have moved it. Where the two cannot be told
// apart, such rows are scanned again and every column that could be the best is measured from the rows as given. So the
// answer is that of the measured values, ties go to the lower index, and the scan costs six operations a pair. Behind a
// `Screen` the columns that could be the best are listed as they go by, and measured where there is more than one.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/screen.hpp"

namespace nearfar {
namespace {

/// What is minimised: the squared distance, direct or expanded, 1 - <u, v> of unit rows, the negative dot product, or a
/// score of |x_k - y_k|.
enum class Key { direct, expanded, cosine, negative_dot, coordinate };

/// One pair, measured from the rows as given (`Source::view`); `rows` holds 2 d values.
template <class T, Key KEY, class Score = SquaredDifference>
struct Measure {
  static constexpr bool kDistance = KEY == Key::direct || KEY == Key::expanded;
  const Operands<T>& o;
  Score score = {};

  /// From the differences of the rows; of unit rows, 1 - <u, v> = |u - v|^2 / 2.
  T near(const T* a, const T* b) const {
    const T square = o.direct_distance(a, b);
    return KEY == Key::cosine ? square / 2 : square;
  }
  T near(int64_t i, int64_t j, T* rows) const { return near(o.x.view(i, rows), o.y.view(j, rows + o.d)); }

  T operator()(int64_t i, int64_t j, T* rows) const { return (*this)(o.x.view(i, rows), o.y.view(j, rows + o.d)); }
  T operator()(const T* a, const T* b) const {
    if (kDistance) return near(a, b);
    if (KEY == Key::coordinate) return by_coordinate(a, b);
    const double s = Source<T>::dot(a, b, o.d);
    if (KEY == Key::negative_dot) return static_cast<T>(-s);
    return 1 - s <= Operands<T>::kNear ? near(a, b) : static_cast<T>(1 - s);
  }

 private:
  T by_coordinate(const T* a, const T* b) const {
    constexpr int L = kLanes<T>;
    Vec<T> sum = Vec<T>{};
    int64_t k = 0;
    for (; k + L <= o.d; k += L) score.accumulate(sum, load(a + k), load(b + k));
    alignas(64) T rest[2][L] = {};
    for (int64_t u = 0; k + u < o.d; ++u) rest[0][u] = a[k + u], rest[1][u] = b[k + u];
    score.accumulate(sum, load(rest[0]), load(rest[1]));
    if constexpr (!std::is_same_v<Score, LargestDifference>) return hsum<T>(sum);
    T most = sum[0];
    for (int u = 1; u < L; ++u) most = most != most || most > sum[u] ? most : sum[u];
    return most;
  }
};

template <class T, Key KEY>
class Nearest {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr bool kSettles = KEY == Key::expanded || KEY == Key::cosine;
  static constexpr bool kScreens = std::is_same_v<T, float> && kSettles;

 public:
  /// Room for one strip; each task has its own. screen: null where every column is scored in full.
  explicit Nearest(const Operands<T>& operands, const Screen* screen = nullptr)
      : o_(operands),
        screen_(kScreens ? screen : nullptr),
        rows_(o_.row_buffer() + kLanes<T>),
        packed_(P::kStripRows * o_.d),
        block_(o_.chunks.tiles_each * P::MR * NR) {
    constexpr int64_t kWidth = 120;  // an odd number of cache lines, so that lists do not share places in L1
    if (screen_) screen_->open(rounded_, ranks_), list_.open(P::kStripRows, kWidth);
  }

  /// For the strip from `row` on: index[lane], -1 for a row that is near to nothing.
  void strip(int64_t row, int64_t* index) {
    const int64_t n = o_.x.n(), rows = n - row < P::kStripRows ? n - row : P::kStripRows;
    const int64_t panels = ceil_div(rows, NR);
    if (screen_ && !screen_->helps()) screen_ = nullptr;
    for (int64_t i = 0; i < P::kStripRows; ++i) {
      low_[i] = high_[i] = second_[i] = -std::numeric_limits<T>::infinity();
      index[i] = -1;
    }
    bool open[P::kPanels];
    for (int64_t q = 0; q < panels; ++q) open[q] = true;
    if constexpr (kScreens)
      if (screen_) screened(row, rows, index, open);
    for (int64_t q = 0; q < panels; ++q)
      if (open[q]) o_.pack_panel(row + q * NR, T(1), rows_.get(), packed_.get() + q * NR * o_.d, squares_ + q * NR);
    for (int64_t chunk = 0; chunk < o_.chunks.count; ++chunk)
      for (int64_t q = 0; q < panels; ++q) {
        if (!open[q]) continue;
        compute(chunk, q);
        scan(chunk, q, index + q * NR);
      }
    if (!kSettles) return;
    for (int64_t q = 0; q < panels; ++q)
      if (open[q]) settle(row + q * NR, q, index + q * NR);
  }

 private:
  void compute(int64_t chunk, int64_t q) {
    o_.raw_block(o_.chunks.tile_begin(chunk), o_.chunks.tile_end(chunk), packed_.get() + q * NR * o_.d, block_.get());
  }

  /// By the ranks that columns can have. Panels with a row that no bound covers, or that too many columns could be the
  /// best of, stay open.
  void screened(int64_t row, int64_t rows, int64_t* index, bool* open) {
    const int64_t panels = ceil_div(rows, NR);
    for (int64_t q = 0; q < panels; ++q) {
      read_rows<NR>(o_.x, row + q * NR, rows_.get());
      screen_->pack_panel(rows_.get(), q, rounded_);
      open[q] = !rounded_.covered[q];
    }
    list_.clear(P::kStripRows);
    for (int64_t run = 0; run < screen_->runs(); ++run)
      for (int64_t q = 0; q < panels; ++q) {
        if (open[q]) continue;
        screen_->template block<true>(run, rounded_, q, ranks_, low_ + q * NR);
        open[q] = !list(run, q);
      }
    int64_t measured = 0;
    for (int64_t q = 0; q < panels; ++q) {
      const int64_t end = rows < (q + 1) * NR ? rows : (q + 1) * NR;
      if (open[q]) measured += (end - q * NR) * o_.chunks.columns;
      for (int64_t i = q * NR; i < (q + 1) * NR; ++i) {
        if (!open[q] && i < end) measured += settle_listed(row + i, i, index[i]);
        low_[i] = -std::numeric_limits<T>::infinity();
      }
    }
    screen_->report(measured, rows * o_.chunks.columns);
  }

  T bar(int64_t lane) const { return low_[lane] - 2 * rounded_.slack[lane]; }

  /// Lists the columns of a run that could be the best; false where there are too many.
  bool list(int64_t run, int64_t q) {
    alignas(64) T bars[NR];
    for (int64_t lane = 0; lane < NR; ++lane) bars[lane] = bar(q * NR + lane);
    const int64_t begin = screen_->run_begin(run), count = ranks_.find(screen_->run_end(run) - begin, bars);
    for (int64_t f = 0; f < count; ++f)
      for (unsigned lanes = ranks_.found[f].lanes; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const int64_t c = ranks_.found[f].column;
        if (!list_.add(q * NR + lane, {ranks_.upper[c * NR + lane], static_cast<int32_t>(begin + c)}, bars[lane]))
          return false;
      }
    return true;
  }

  /// Measures what is listed for a row, unless that is one column; how many were measured. The one that can have the
  /// highest rank comes first: its exact rank rules out most of the others.
  int64_t settle_listed(int64_t row, int64_t lane, int64_t& index) {
    list_.keep(lane, bar(lane));
    index = list_.highest(lane);
    if (list_.count(lane) == 1) return 0;
    const Measure<T, KEY> measure{o_};
    const int64_t first = index;
    T smallest = measure(row, first, rows_.get());
    const T exact = (KEY == Key::expanded ? rounded_.square[lane] : T(1)) - smallest;
    list_.keep(lane, exact - 2 * rounded_.slack[lane]);
    int64_t measured = 1;
    for (int64_t c = 0; c < list_.count(lane); ++c) {
      const int64_t j = list_.column(lane, c);
      if (j == first) continue;
      const T value = measure(row, j, rows_.get());
      ++measured;
      if (value < smallest || (value == smallest && j < index)) smallest = value, index = j;
    }
    return measured;
  }

  int64_t column_begin(int64_t chunk) const { return o_.chunks.tile_begin(chunk) * P::MR; }
  int64_t column_end(int64_t chunk) const {
    const int64_t end = o_.chunks.tile_end(chunk) * P::MR;
    return end < o_.chunks.columns ? end : o_.chunks.columns;
  }

  /// What is maximised.
  template <class V>
  NEARFAR_INLINE V rank(V s, int64_t j) const {
    if (KEY == Key::direct) return -s;
    if (KEY == Key::expanded) return T(2) * s - *o_.squares(j);
    return s;
  }

  /// How far a computed rank can be from the exact one: d roundings in a product of norms |x| |y| <= (|x|^2 + |y|^2) /
  /// 2, and a few more for shifting and squaring.
  NEARFAR_INLINE Vec<T> error(int64_t q, int v) const {
    if (!kSettles) return Vec<T>{};
    constexpr T kUnit = std::numeric_limits<T>::epsilon() / 2;
    const int64_t at = q * NR + v * kLanes<T>;
    const Vec<T> squares = KEY == Key::cosine ? splat<T>(T(2)) : load(squares_ + at) + o_.largest_square();
    return squares * (kUnit * static_cast<T>(o_.d + 16));
  }

  void scan(int64_t chunk, int64_t q, int64_t* index) {
    Vec<T> best[P::kVectors], second[P::kVectors];
    IVec<T> where[P::kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < P::kVectors; ++v) {
      best[v] = second[v] = splat<T>(-std::numeric_limits<T>::infinity());
      where[v] = isplat<T>(-1);
    }
    const int64_t begin = column_begin(chunk), end = column_end(chunk);
    const T* s = block_.get();
    IVec<T> here = IVec<T>{};  // j - begin
    for (int64_t j = begin; j < end; ++j, s += NR, here += 1) {
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) {
        // A NaN is not better than anything and leaves both states as they are.
        const Vec<T> value = rank(load(s + v * kLanes<T>), j);
        where[v] = select(value > best[v], here, where[v]);
        if (kSettles) second[v] = vmax(vmin(best[v], value), second[v]);
        best[v] = vmax(value, best[v]);
      }
    }
    for (int v = 0; v < P::kVectors; ++v) {
      const int64_t at = q * NR + v * kLanes<T>;
      const Vec<T> e = error(q, v), low = best[v] - e, high = best[v] + e;
      const IVec<T> wins = low > load(low_ + at);
      const Vec<T> loser = select(wins, load(high_ + at), high);
      store(second_ + at, vmax(vmax(second[v] + e, loser), load(second_ + at)));
      store(low_ + at, select(wins, low, load(low_ + at)));
      store(high_ + at, select(wins, high, load(high_ + at)));
      for (int u = 0; u < kLanes<T>; ++u)
        if (wins[u]) index[v * kLanes<T> + u] = begin + where[v][u];
    }
  }

  /// Measures what ranks cannot tell apart.
  void settle(int64_t row, int64_t q, int64_t* index) {
    const int64_t lanes = o_.x.n() - row < NR ? o_.x.n() - row : NR;
    int64_t open[NR], count = 0;
    for (int64_t lane = 0; lane < lanes; ++lane)
      if (index[lane] >= 0 && second_[q * NR + lane] >= low_[q * NR + lane]) open[count++] = lane;
    if (count) settle_lanes(row, q, open, count, index);
  }

  __attribute__((noinline)) void settle_lanes(int64_t row, int64_t q, const int64_t* open, int64_t count,
                                              int64_t* index) {
    const Measure<T, KEY> measure{o_};
    T smallest[NR];
    for (int64_t c = 0; c < count; ++c) smallest[open[c]] = std::numeric_limits<T>::infinity();
    alignas(64) T errors[NR];
    for (int v = 0; v < P::kVectors; ++v) store(errors + v * kLanes<T>, error(q, v));
    for (int64_t chunk = 0; chunk < o_.chunks.count; ++chunk) {
      compute(chunk, q);
      const int64_t begin = column_begin(chunk), end = column_end(chunk);
      for (int64_t c = 0; c < count; ++c) {
        const int64_t lane = open[c];
        const T least = low_[q * NR + lane] - errors[lane];
        for (int64_t j = begin; j < end; ++j) {
          if (!(rank(block_[(j - begin) * NR + lane], j) >= least)) continue;
          const T value = measure(row + lane, j, rows_.get());
          if (value < smallest[lane]) smallest[lane] = value, index[lane] = j;
        }
      }
    }
  }

  const Operands<T>& o_;
  const Screen* screen_;
  Buffer<T> rows_, packed_, block_;
  Screen::Strip rounded_;
  Screen::Ranks ranks_;
  Shortlist list_;
  alignas(64) T squares_[P::kStripRows];
  // Bounds of the best rank, and the highest that any other column can have.
  alignas(64) T low_[P::kStripRows], high_[P::kStripRows], second_[P::kStripRows];
};

}  // namespace
}  // namespace nearfar
