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
// Where a lane holds two numbers (kPerLane, bfloat16.hpp) a step of the sum takes both, so there are half as many.
//
// Vocabulary of sizes: a panel is NR rows of x, a strip is kStripRows rows of x, a tile is MR rows of y, a chunk is a
// run of tiles. All are functions of the shape alone, so results do not depend on the number of threads.
#pragma once

#include "cpu/bfloat16.hpp"
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

/// out[M][NR] (+)= y^T W over the columns of a chunk, for the M coordinates at which the tiles of y begin. `factor`
/// scales lanes.
template <class Score, class T, int M>
void product_dx(int64_t tiles, const T* y_tiles, int64_t tile_stride, const T* weights, const T* factor, bool add,
                T* out) {
  using P = Policy<T>;
  constexpr int kSteps = P::MR / kPerLane<Score>;
  Vec<T> acc[M][P::kVectors];
  clear<T>(acc);
  for (int64_t t = 0; t < tiles; ++t) {
    const T* tile = y_tiles + t * tile_stride;
    // What the next call reads of this tile: pieces so short and far apart that the CPU does not foresee them.
    for (int u = 0; u < P::MR * kSteps; u += kCacheLine<T>) __builtin_prefetch(tile + P::MR * kSteps + u);
    multiply<Score, T, M, P::kVectors, kSteps, 1>(kSteps, tile, weights + t * kSteps * P::NR, acc);
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
template <class Score, class T, int V>
void product_dy(int64_t panels, const T* weights, int64_t panel_stride, const T* x_rows, int64_t rows_valid,
                int64_t lanes_valid, T* out, int64_t out_stride) {
  using P = Policy<T>;
  constexpr int kSteps = P::NR / kPerLane<Score>;
  Vec<T> acc[P::MR][V];
  clear<T>(acc);
  // Rows of out lie far apart too, and are needed only after the product.
  for (int64_t r = 0; r < P::MR && r < rows_valid; ++r)
    for (int v = 0; v < P::NR; v += kCacheLine<T>) __builtin_prefetch(out + r * out_stride + v, 1);
  for (int64_t p = 0; p < panels; ++p)
    multiply<Score, T, P::MR, V, kSteps, 1>(kSteps, weights + p * panel_stride, x_rows + p * kSteps * P::NR, acc);
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

/// f(first, last) for runs of tiles, which are packed at once.
template <class F>
void for_tiles(int64_t tiles, int threads, F f) {
  constexpr int64_t kTilesPerTask = 16;
  parallel_for(ceil_div(tiles, kTilesPerTask), threads, [&](int64_t task, int) {
    const int64_t first = task * kTilesPerTask;
    f(first, first + kTilesPerTask < tiles ? first + kTilesPerTask : tiles);
  });
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

}  // namespace
}  // namespace nearfar
