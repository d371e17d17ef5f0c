// The tile engine: packed panels and a register-blocked micro-kernel.
//
// A block of scores is stored as S[column][lane]: the rows of x run along the SIMD lanes, the rows of y are broadcast.
// So every reduction over columns (max, sum of exponentials, arg-min) is vertical, without a horizontal step, and the
// same block serves unchanged as an operand of both products of a gradient:
//
//   scores   S[j][i]   = sum_k y[j][k] x[k][i]      broadcast y tiles  [k][MR],  vectors x panel [k][NR]
//   dx       dX[k][i] += sum_j y[j][k] W[j][i]      broadcast y tiles  (strides swapped), vectors W [j][NR]
//   dy       dY[j][k] += sum_i W[j][i] x[i][k]      broadcast W (strides swapped), vectors x rows [i][NR of k]
//
// Vocabulary of sizes: a panel is NR rows of x, a strip is kStripRows rows of x, a tile is MR rows of y, a chunk is a
// run of tiles. All are functions of the shape alone, so results do not depend on the number of threads.
#pragma once

#include "cpu/rows.hpp"
#include "cpu/transpose.hpp"
#include "pairwise/map.hpp"

namespace nearfar {
namespace {

/// MR x 2 accumulators, two vectors of x and one broadcast fill the register file; on Arm a broadcast is a lane of a
/// register, and compilers hold all MR of them.
template <class T>
struct Policy {
  static constexpr int kVectors = 2;
  static constexpr int NR = kVectors * kLanes<T>;
  static constexpr int MR = kVectorBytes == 64 ? 12 : kRegisters == 32 ? 8 : 6;
  static constexpr int kStripRows = 128;
  static constexpr int kPanels = kStripRows / NR;
  static constexpr int kTilesPerChunk = 240 / MR;  // a chunk of 240 columns: its block of scores fits in L1
};

/// Values in a line of the caches.
template <class T>
constexpr int kCacheLine = 64 / static_cast<int>(sizeof(T));

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- micro-kernel ---------------------------------------------------------------------------------------------------

/// acc[r][v] (+)= sum_k a[r * AR + k * AK] b[k][v]; b has NR lanes a step. Arrays stay in registers only when every
/// loop over them is unrolled by force.
template <class Score, class T, int M, int V, int AR, int AK>
NEARFAR_INLINE void multiply(int64_t steps, const T* a, const T* b, Vec<T> (&acc)[M][V], Score score = {}) {
  constexpr int NR = Policy<T>::NR;
  for (int64_t k = 0; k < steps; ++k) {
    Vec<T> vectors[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) vectors[v] = load(b + k * NR + v * kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      const Vec<T> scalar = splat<T>(a[r * AR + k * AK]);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) score.accumulate(acc[r][v], scalar, vectors[v]);
    }
  }
}

template <class T, int M, int V>
NEARFAR_INLINE void clear(Vec<T> (&acc)[M][V]) {
#pragma GCC unroll 12
  for (int r = 0; r < M; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
}

/// One pass over the depth of score_block; `ADD` to what is there. Two functions, because one that decides inside keeps
/// its accumulators in memory around the loop: 7 % at 64 dimensions.
template <bool ADD, class Score, class T>
NEARFAR_INLINE void score_tiles(int64_t depth, int64_t tiles, const T* y_tiles, int64_t tile_stride, const T* x_panel,
                                T* scores, Score score) {
  using P = Policy<T>;
  for (int64_t t = 0; t < tiles; ++t) {
    Vec<T> acc[P::MR][P::kVectors];
    T* out = scores + t * P::MR * P::NR;
    clear<T>(acc);
    if constexpr (ADD)
#pragma GCC unroll 12
      for (int r = 0; r < P::MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) acc[r][v] = load(out + r * P::NR + v * kLanes<T>);
    multiply<Score, T, P::MR, P::kVectors, 1, P::MR>(depth, y_tiles + t * tile_stride, x_panel, acc, score);
#pragma GCC unroll 12
    for (int r = 0; r < P::MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) store(out + r * P::NR + v * kLanes<T>, acc[r][v]);
  }
}

/// Scores of `tiles` tiles of y against one panel of x: S[tiles * MR][NR].
template <class Score, class T>
void score_block(int64_t d, int64_t tiles, const T* y_tiles, int64_t tile_stride, const T* x_panel, T* scores,
                 Score score = {}) {
  using P = Policy<T>;
  // Depth is cut so that a panel of x stays in L1 beside the tile of y.
  constexpr int64_t kDepth = 256;
  const auto depth_from = [d](int64_t k0) { return d - k0 < kDepth + kDepth / 2 ? d - k0 : kDepth; };
  int64_t k0 = depth_from(0);
  score_tiles<false>(k0, tiles, y_tiles, tile_stride, x_panel, scores, score);
  for (; k0 < d; k0 += depth_from(k0))
    score_tiles<true>(depth_from(k0), tiles, y_tiles + k0 * P::MR, tile_stride, x_panel + k0 * P::NR, scores, score);
}

/// out[M][NR] (+)= y^T W over the columns of a chunk, for the M coordinates from k0 on. `factor` scales lanes.
template <class T, int M>
void product_dx(int64_t k0, int64_t tiles, const T* y_tiles, int64_t tile_stride, const T* weights, const T* factor,
                bool add, T* out) {
  using P = Policy<T>;
  Vec<T> acc[M][P::kVectors];
  clear<T>(acc);
  for (int64_t t = 0; t < tiles; ++t) {
    const T* tile = y_tiles + t * tile_stride + k0 * P::MR;
    // What the next call reads of this tile: pieces so short and far apart that the CPU does not foresee them.
    for (int u = 0; u < P::MR * P::MR; u += kCacheLine<T>) __builtin_prefetch(tile + P::MR * P::MR + u);
    multiply<Dot, T, M, P::kVectors, P::MR, 1>(P::MR, tile, weights + t * P::MR * P::NR, acc);
  }
#pragma GCC unroll 2
  for (int v = 0; v < P::kVectors; ++v) {
    const Vec<T> scale = factor ? load(factor + v * kLanes<T>) : splat<T>(T(1));
#pragma GCC unroll 12
    for (int r = 0; r < M; ++r) {
      T* place = out + r * P::NR + v * kLanes<T>;
      store(place, add ? load(place) + acc[r][v] * scale : acc[r][v] * scale);
    }
  }
}

/// out[MR][lanes of d] += W^T x for one tile of columns; W is [panel][column][lane], x is [row][NR].
template <class T, int V>
void product_dy(int64_t panels, const T* weights, int64_t panel_stride, const T* x_rows, int64_t rows_valid,
                int64_t lanes_valid, T* out, int64_t out_stride) {
  using P = Policy<T>;
  Vec<T> acc[P::MR][V];
  clear<T>(acc);
  // Rows of out lie far apart too, and are needed only after the product.
  for (int64_t r = 0; r < P::MR && r < rows_valid; ++r)
    for (int v = 0; v < P::NR; v += kCacheLine<T>) __builtin_prefetch(out + r * out_stride + v, 1);
  for (int64_t p = 0; p < panels; ++p)
    multiply<Dot, T, P::MR, V, P::NR, 1>(P::NR, weights + p * panel_stride, x_rows + p * P::NR * P::NR, acc);
  if (rows_valid >= P::MR && lanes_valid >= V * kLanes<T>) {
#pragma GCC unroll 12
    for (int r = 0; r < P::MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        T* place = out + r * out_stride + v * kLanes<T>;
        store(place, load(place) + acc[r][v]);
      }
  } else {
    T buffer[P::MR][P::NR];
#pragma GCC unroll 12
    for (int r = 0; r < P::MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(&buffer[r][v * kLanes<T>], acc[r][v]);
    for (int64_t r = 0; r < P::MR && r < rows_valid; ++r)
      for (int64_t k = 0; k < V * kLanes<T> && k < lanes_valid; ++k) out[r * out_stride + k] += buffer[r][k];
  }
}

// ---- packing --------------------------------------------------------------------------------------------------------

/// Rows are read into a buffer whose stride is a whole number of vectors.
template <class T>
int64_t padded(int64_t d) {
  return ceil_div(d, kLanes<T>) * kLanes<T>;
}

/// W rows, zeros where index(r) is not one of them.
template <int W, class T, class F>
void read_rows_at(const Source<T>& source, F index, T* rows) {
  const int64_t d = source.d(), stride = padded<T>(d);
  for (int64_t r = 0; r < W; ++r) {
    T* row = rows + r * stride;
    int64_t k = 0;
    if (const int64_t i = index(r); i < source.n()) {
      source.get_packed(i, row);
      k = d;
    }
    for (; k < stride; ++k) row[k] = 0;
  }
}

/// W rows from i0 on.
template <int W, class T>
void read_rows(const Source<T>& source, int64_t i0, T* rows) {
  read_rows_at<W>(source, [i0](int64_t r) { return i0 + r; }, rows);
}

/// W rows side by side: out[k][W] = row(r, k), a vector of values from k on, for k < d. E: any type of the size of T.
template <int W, class T, class E, class F>
NEARFAR_INLINE void interleave(int64_t d, E* out, F row) {
  constexpr int L = kLanes<T>;
  for (int64_t k = 0; k < d; k += L)
#pragma GCC unroll 4
    for (int r = 0; r < W; r += L) {
      Vec<T> block[L];
#pragma GCC unroll 16
      for (int u = 0; u < L; ++u) block[u] = r + u < W ? row(r + u, k) : Vec<T>{};
      transpose<T>(block);
      constexpr size_t kPart = (W % L) * sizeof(T);
      if (d - k >= L && r + L <= W) {
#pragma GCC unroll 16
        for (int u = 0; u < L; ++u) __builtin_memcpy(out + (k + u) * W + r, &block[u], sizeof block[u]);
        continue;
      }
      alignas(64) T lanes[L][L];
#pragma GCC unroll 16
      for (int u = 0; u < L; ++u) store(lanes[u], block[u]);
      for (int64_t u = 0; u < L && u < d - k; ++u)
        __builtin_memcpy(out + (k + u) * W + r, lanes[u], r + L <= W ? sizeof lanes[u] : kPart);
    }
}

/// The same for scale * rows[r][k].
template <int W, class T>
void pack(const T* rows, int64_t d, T scale, T* out) {
  const int64_t stride = padded<T>(d);
  interleave<W, T>(d, out, [&](int r, int64_t k) { return load(rows + r * stride + k) * splat<T>(scale); });
}

/// Where the columns of a problem are cut.
struct Chunks {
  int64_t columns, tiles, count, tiles_each;

  template <class T>
  static Chunks of(int64_t columns) {
    using P = Policy<T>;
    Chunks c;
    c.columns = columns;
    c.tiles = ceil_div(columns, P::MR);
    // A multiple of four chunks where there are few, so that small problems have work for several threads, and as much
    // for each.
    const int64_t wanted = ceil_div(c.tiles, P::kTilesPerChunk), even = wanted > 16 ? wanted : (wanted + 3) / 4 * 4;
    c.count = c.tiles < even ? c.tiles : even;
    c.tiles_each = c.count ? ceil_div(c.tiles, c.count) : 1;
    c.count = ceil_div(c.tiles, c.tiles_each);
    return c;
  }
  /// Few strips of rows leave threads idle: into how many parts the columns are cut then, by the shape alone.
  int64_t parts(int64_t strips) const {
    if (strips == 0 || strips >= 16 || count == 0) return 1;
    return 16 / strips < count ? 16 / strips : count;
  }
  int64_t tile_begin(int64_t chunk) const { return chunk * tiles_each; }
  int64_t tile_end(int64_t chunk) const { return (chunk + 1) * tiles_each < tiles ? (chunk + 1) * tiles_each : tiles; }
};

// ---- operands -------------------------------------------------------------------------------------------------------

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

  /// products: the packed points are also multiplied by weights (gradients), so they must be centred in any case.
  /// kind: looked at where the score is none that a product gives; then `distance` is false. pack_y: false where the
  /// caller packs a chunk of y when it comes to it, so that no copy of all of y is made.
  Operands(const Rows& x_rows, const Rows& y_rows, bool normalize, bool distance, bool products, int threads,
           ScoreKind kind = ScoreKind::dot, bool pack_y = true)
      : x(x_rows),
        y(y_rows),
        d(x_rows.d),
        distance_(distance),
        direct_(distance && d <= kDirectDims),
        kind_(kind),
        chunks(Chunks::of<T>(y_rows.n)) {
    if (normalize) {
      x.normalize(threads);
      y.normalize(threads);
    }
    if (distance && (products || !direct_)) find_center();
    tile_stride = ceil_div(d, P::MR) * P::MR * P::MR;
    if (!pack_y) return;
    tiles_ = Buffer<T>(chunks.tiles * tile_stride);
    if (distance) squares_ = Buffer<T>(chunks.tiles * P::MR);
    constexpr int64_t kTilesPerTask = 16;
    parallel_for(ceil_div(chunks.tiles, kTilesPerTask), threads, [&](int64_t task, int) {
      Buffer<T> rows(P::MR * padded<T>(d));
      const int64_t first = task * kTilesPerTask;
      const int64_t last = first + kTilesPerTask < chunks.tiles ? first + kTilesPerTask : chunks.tiles;
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

  bool packed() const { return tiles_.get() != nullptr; }
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

  Buffer<T> tiles_, squares_;
  Buffer<T> center_;
  T largest_square_ = 0;
};

}  // namespace
}  // namespace nearfar
