// Operands: both point sets as the engine reads them, and blocks of their scores.
#pragma once

#include "cpu/halves.hpp"

namespace nearfar {
namespace {

/// Places in a block of scores, in a buffer that has room for all of them.
struct Places {
  int32_t* list = nullptr;
  int64_t count = 0, base = 0;  // base: added to every place, for a block that is a part of another
  void add(int64_t place) { list[count++] = static_cast<int32_t>(base + place); }
};

/// Both point sets, ready for the engine: y packed once, x packed a panel at a time.
///
/// Squared distances come from differences up to kDirectDims dimensions, where that is exact and also fast, and above
/// from |x|^2 + |y|^2 - 2 <x, y> on points shifted to a common centre, with norms of the very operands that are
/// multiplied. What no expansion gets right, pairs closer than kNear (|x|^2 + |y|^2), is computed again from the
/// original rows, so nearby points far from the origin keep their relative accuracy and identical rows give exactly 0.
template <class T>
class Operands {
 public:
  using P = Policy<T>;
  static constexpr int64_t kDirectDims = 16;
  static constexpr T kNear = T(1) / 512;

  /// products: the packed points are also multiplied by weights (gradients), so for distances they must be centred.
  /// kind: looked at where the score is none that a product gives; then `distance` is false. pack_y: false where the
  /// caller packs a chunk of y when it comes to it, so that no copy of all of y is made. x_order, y_order: in which
  /// rows are packed, null for their own.
  Operands(const Rows& x_rows, const Rows& y_rows, bool normalize, bool distance, bool products, int threads,
           ScoreKind kind = ScoreKind::dot, bool pack_y = true, const int32_t* x_order = nullptr,
           const int32_t* y_order = nullptr)
      : x(x_rows),
        y(y_rows),
        d(x_rows.d),
        distance_(distance),
        direct_(distance && d <= kDirectDims),
        kind_(kind),
        chunks(Chunks::of<T>(y_rows.n)) {
    x.arrange(x_order);
    y.arrange(y_order);
    if (normalize) {
      x.normalize(threads);
      y.normalize(threads);
    }
    if (distance && (products || !direct_)) find_center();
    tile_stride = ceil_div(d, P::MR) * P::MR * P::MR;
    if (!pack_y) return;
    if constexpr (kHalves<T>)
      if (!distance && kind == ScoreKind::dot && Halves::serve(x_rows, y_rows)) {
        halves_ = Halves(x, y, chunks.tiles, products, threads);
        return;
      }
    tiles_ = Buffer<T>(chunks.tiles * tile_stride);
    if (distance) squares_ = Buffer<T>(chunks.tiles * P::MR);
    for_tiles(chunks.tiles, threads, [&](int64_t first, int64_t last) {
      Buffer<T> rows(P::MR * padded<T>(d));
      pack_tiles(first, last, rows.get(), tiles_.get() + first * tile_stride, squares_.get() + first * P::MR);
    });
    if (distance)
      for (int64_t j = 0; j < y.n(); ++j)
        if (squares_[j] > largest_square_ && std::isfinite(squares_[j])) largest_square_ = squares_[j];
  }

  /// Packs tiles [t0, t1) of y, and their squared norms for distances; `rows` holds MR * padded(d) values.
  void pack_tiles(int64_t t0, int64_t t1, T* rows, T* tiles, T* squares) const {
    for (int64_t t = t0; t < t1; ++t) {
      T* tile = tiles + (t - t0) * tile_stride;
      read_rows<P::MR>(y, t * P::MR, rows);
      pack<P::MR>(rows, d, T(1), tile);
      for (int64_t k = d * P::MR; k < tile_stride; ++k) tile[k] = 0;
      if (distance_)
        for (int r = 0; r < P::MR; ++r)
          squares[(t - t0) * P::MR + r] = static_cast<T>(y.squared_norm(rows + r * padded<T>(d)));
    }
  }

  /// Packs NR rows of x from i0 on as panel[k][NR], and their squared norms; `rows` (NR * padded(d)) keeps the rows.
  void pack_panel(int64_t i0, T scale, T* rows, T* panel, T* squares) const {
    read_rows<P::NR>(x, i0, rows);
    pack<P::NR>(rows, d, scale, panel);
    if (!squares || !distance_) return;
    for (int v = 0; v < P::kVectors; ++v) {
      Vec<T> sum = Vec<T>{};
      for (int64_t k = 0; k < d; ++k) {
        const Vec<T> own = load(panel + k * P::NR + v * kLanes<T>);
        sum += own * own;
      }
      store(squares + v * kLanes<T>, sum);
    }
  }
  int64_t row_buffer() const { return P::NR * padded<T>(d); }

  bool packed() const { return tiles_.get() != nullptr || halves_; }
  /// Both sets as bfloat16 numbers, two a lane: then `tile` and `block` are not there.
  const Halves& halves() const { return halves_; }
  const T* tile(int64_t t) const { return tiles_.get() + t * tile_stride; }
  const T* squares(int64_t column) const { return squares_.get() + column; }
  /// Of the finite rows of y as they are packed.
  T largest_square() const { return largest_square_; }

  /// S[columns][NR] for tiles [t0, t1) and a packed panel: dot products, or squared distances. `near` takes the places
  /// of near pairs in S.
  void block(int64_t t0, int64_t t1, int64_t i0, const T* panel, const T* x_squares, T* scores,
             Places* near = nullptr) const {
    raw_block(t0, t1, panel, scores);
    if (!distance_) return;
    if (!direct_) {
      expand(t0, t1, i0, x_squares, scores, near);
    } else if (near) {
      find_near(t0, t1, i0, x_squares, scores, *near);
    }
  }

  /// The same before the expansion: dot products, or squared distances where those are direct.
  void raw_block(int64_t t0, int64_t t1, const T* panel, T* scores) const {
    raw_block(t1 - t0, tile(t0), panel, scores);
  }
  void raw_block(int64_t tiles, const T* y_tiles, const T* panel, T* scores) const {
    if (by_coordinates()) {
      with_coordinate_score(kind_,
                            [&](auto score) { score_block(d, tiles, y_tiles, tile_stride, panel, scores, score); });
    } else if (direct_) {
      score_block<SquaredDifference>(d, tiles, y_tiles, tile_stride, panel, scores);
    } else {
      score_block<Dot>(d, tiles, y_tiles, tile_stride, panel, scores);
    }
  }

  /// |x_i - y_j|^2 from the rows as given; `rows` holds 2 d values.
  T direct_distance(int64_t i, int64_t j, T* rows) const {
    return direct_distance(x.view(i, rows), y.view(j, rows + d));
  }
  T direct_distance(const T* a, const T* b) const {
    Vec<T> sum = Vec<T>{};
    int64_t k = 0;
    for (; k + kLanes<T> <= d; k += kLanes<T>) {
      const Vec<T> difference = load(a + k) - load(b + k);
      sum += difference * difference;
    }
    T total = hsum<T>(sum);
    for (; k < d; ++k) total += (a[k] - b[k]) * (a[k] - b[k]);
    return total;
  }

  bool distance() const { return distance_; }
  ScoreKind kind() const { return kind_; }
  bool by_coordinates() const { return nearfar::by_coordinates(kind_); }
  bool expanded() const { return distance_ && !direct_; }

  Source<T> x, y;
  int64_t d;
  int64_t tile_stride = 0;

 private:
  bool distance_, direct_;
  ScoreKind kind_;

 public:
  Chunks chunks;

 private:
  void expand(int64_t t0, int64_t t1, int64_t i0, const T* x_squares, T* scores, Places* places) const {
    Vec<T> own[P::kVectors], own_near[P::kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < P::kVectors; ++v) {
      own[v] = load(x_squares + v * kLanes<T>);
      own_near[v] = own[v] * kNear;
    }
    for (int64_t j = t0 * P::MR; j < t1 * P::MR; ++j) {
      T* row = scores + (j - t0 * P::MR) * P::NR;
      const Vec<T> other = splat<T>(squares_[j]), other_near = splat<T>(squares_[j] * kNear);
      IVec<T> near = IVec<T>{};
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) {
        const Vec<T> square = (own[v] + other) - T(2) * load(row + v * kLanes<T>);
        near |= square <= own_near[v] + other_near;
        store(row + v * kLanes<T>, square);
      }
      if (any(near)) mend(j, i0, x_squares, row, row - scores, places);
    }
  }

  __attribute__((noinline)) void mend(int64_t j, int64_t i0, const T* x_squares, T* row, int64_t place,
                                      Places* places) const {
    if (j >= y.n()) return;
    Buffer<T> rows(2 * d);
    for (int lane = 0; lane < P::NR && i0 + lane < x.n(); ++lane) {
      if (!(row[lane] <= (x_squares[lane] + squares_[j]) * kNear)) continue;
      row[lane] = direct_distance(i0 + lane, j, rows.get());
      if (places) places->add(place + lane);
    }
  }

  void find_near(int64_t t0, int64_t t1, int64_t i0, const T* x_squares, const T* scores, Places& places) const {
    const int64_t lanes = x.n() - i0 < P::NR ? x.n() - i0 : P::NR;
    for (int64_t j = t0 * P::MR; j < t1 * P::MR && j < y.n(); ++j) {
      const int64_t place = (j - t0 * P::MR) * P::NR;
      near_lanes(j, x_squares, lanes, [&](int v) { return load(scores + place + v * kLanes<T>); }, place, places);
    }
  }

 public:
  /// Adds the lanes of column j whose squared distance, given a vector at a time, makes a near pair; `place` is lane 0.
  template <class F>
  void near_lanes(int64_t j, const T* x_squares, int64_t lanes, F square, int64_t place, Places& places) const {
    const Vec<T> other = splat<T>(squares_[j]);
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> limit = (load(x_squares + v * kLanes<T>) + other) * kNear;
      const IVec<T> near = square(v) <= limit;
      if (!any(near)) continue;
      for (int k = 0; k < kLanes<T> && v * kLanes<T> + k < lanes; ++k)
        if (near[k]) places.add(place + v * kLanes<T> + k);
    }
  }

 private:
  /// About the mean of (some 256, evenly spaced) rows of y, over finite entries. Any common point is a valid
  /// centre, so each coordinate is rounded to half the binary order of its spread: subtracting it is then exact for
  /// most points, and points with integer coordinates keep integer ones, so ties stay ties.
  void find_center() {
    const int64_t step = y.n() > 256 ? y.n() / 256 : 1;
    center_ = Buffer<T>(d);
    // Moments about the first row: one pass, and no digits lost far from the origin.
    Buffer<T> first(d), other(d);
    Buffer<double> sums(d), squares(d), counts(d);
    double *sum = sums.get(), *square = squares.get(), *count = counts.get();
    if (y.n() > 0) y.get(0, first.get());
    for (int64_t k = 0; k < d; ++k) {
      if (y.n() == 0 || !std::isfinite(first[k])) first[k] = 0;
      sum[k] = square[k] = count[k] = 0;
    }
    for (int64_t j = 0; j < y.n(); j += step) {
      const T *row = y.view(j, other.get()), *origin = first.get();
      for (int64_t k = 0; k < d; ++k) {
        const double from = static_cast<double>(row[k]) - static_cast<double>(origin[k]);
        const bool finite = from - from == 0;
        sum[k] += finite ? from : 0.0;
        square[k] += finite ? from * from : 0.0;
        count[k] += finite ? 1.0 : 0.0;
      }
    }
    for (int64_t k = 0; k < d; ++k) {
      const double shift = count[k] > 0 ? sum[k] / count[k] : 0;
      const double spread = count[k] > 0 ? std::sqrt(square[k] / count[k] - shift * shift) : 0;
      double center = static_cast<double>(first[k]) + shift;
      if (spread > 0) {  // not where rounding made it NaN
        const double grid = std::ldexp(1.0, std::ilogb(spread) - 1);
        center = std::nearbyint(center / grid) * grid;
      }
      center_[k] = static_cast<T>(center);
    }
    x.shift(center_.get());
    y.shift(center_.get());
  }

  Halves halves_;
  Buffer<T> tiles_, squares_;
  Buffer<T> center_;
  T largest_square_ = 0;
};

}  // namespace
}  // namespace nearfar
