// Both point sets as bfloat16 numbers, two a lane, for the products of such rows (bfloat16.hpp): their scores, and with
// weights rounded to bfloat16 their gradients, each in half the time of float32.
//
//   scores   S[j][i]   = sum_k y[j][k] x[k][i]      y tiles [k/2][MR],  x panel [k/2][NR]     pairs of coordinates
//   dx       dX[k][i] += sum_j y[j][k] W[j][i]      y tiles [k][MR/2],  W [j/2][NR]           pairs of columns
//   dy       dY[j][k] += sum_i W[j][i] x[i][k]      W [j][NR/2],        x rows [i/2][NR of k]   pairs of rows
//
// Normalised rows would not be bfloat16 numbers, so they are packed as given times a power of two that brings the norm
// to (1/2, 1]: exact, and no product leaves the range of float32. What is left of the normalisation, a number in (1,
// 2], multiplies scores, and of gradients the weights before they are rounded.
#pragma once

#include "cpu/tile.hpp"

namespace nearfar {
namespace {

class Pairs {
  using T = float;
  using P = Policy<T>;
  static constexpr int NR = P::NR, MR = P::MR, L = kLanes<T>;

 public:
  /// Whether such rows are multiplied so. Shorter ones leave little to save, and what takes less than a millisecond in
  /// any case has the bits of the same rows in float32.
  static bool serve(const Rows& x, const Rows& y) {
    constexpr int64_t kLeastDims = 16;
    constexpr double kLeastWork = 1 << 24;
    const double work = static_cast<double>(x.n) * static_cast<double>(y.n) * static_cast<double>(x.d);
    return x.dtype == DType::bf16 && y.dtype == DType::bf16 && x.d >= kLeastDims && work >= kLeastWork;
  }

  Pairs() = default;

  /// products: y is multiplied by weights too.
  Pairs(const Source<T>& y, int64_t tiles, bool products, int threads)
      : steps_(ceil_div(y.d(), 2)),
        tile_stride_(steps_ * MR),
        column_stride_(ceil_div(y.d(), MR) * MR * (MR / 2)),
        tiles_(tiles * tile_stride_),
        columns_(products ? tiles * column_stride_ : 0),
        rest_(tiles * MR) {
    constexpr int64_t kTilesPerTask = 16;
    parallel_for(ceil_div(tiles, kTilesPerTask), threads, [&](int64_t task, int) {
      const int64_t d = y.d(), stride = row_stride(d), last = (task + 1) * kTilesPerTask;
      Buffer<T> buffer(MR * stride);
      const T* rows = buffer.get();
      for (int64_t t = task * kTilesPerTask; t < last && t < tiles; ++t) {
        for (int r = 0; r < MR; ++r) rest_[t * MR + r] = read(y, t * MR + r, buffer.get() + r * stride);
        pack_rows<MR>(rows, d, tiles_.get() + t * tile_stride_);
        if (!products) continue;
        T* columns = columns_.get() + t * column_stride_;
        interleave<MR / 2, T>(d, columns, [&](int r, int64_t k) {
          return side_by_side(load(rows + 2 * r * stride + k), load(rows + (2 * r + 1) * stride + k));
        });
        for (int64_t k = d * (MR / 2); k < column_stride_; ++k) columns[k] = 0;
      }
    });
  }

  explicit operator bool() const { return steps_ > 0; }

  /// Of a buffer of rows: whole vectors of pairs.
  static int64_t row_stride(int64_t d) { return ceil_div(d, 2 * L) * 2 * L; }

  /// Packs NR rows of x from i0 on as panel[steps][NR], and for the product with weights, as [NR / 2][NR] at `operand`
  /// and every `next` values behind it. `rests` takes what is left of their normalisation.
  void pack_panel(const Source<T>& x, int64_t i0, T* rows, T* panel, T* rests, T* operand, int64_t next) const {
    const int64_t d = x.d(), stride = row_stride(d);
    for (int r = 0; r < NR; ++r) rests[r] = read(x, i0 + r, rows + r * stride);
    pack_rows<NR>(rows, d, panel);
    if (!operand) return;
    for (int64_t r = 0; r < NR; r += 2)
      for (int64_t k = 0; k < stride; k += L)
        store(operand + k / NR * next + r / 2 * NR + k % NR,
              side_by_side(load(rows + r * stride + k), load(rows + (r + 1) * stride + k)));
  }

  /// S[columns][NR] = scale <x_i, y_j> for tiles [t0, t1) and a packed panel.
  void block(int64_t t0, int64_t t1, const T* panel, const T* rests, T scale, T* scores) const {
    score_block<PairDot>(steps_, t1 - t0, tiles_.get() + t0 * tile_stride_, tile_stride_, panel, scores);
    Vec<T> own[P::kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < P::kVectors; ++v) own[v] = load(rests + v * L) * splat<T>(scale);
    for (int64_t j = t0 * MR; j < t1 * MR; ++j, scores += NR)
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) store(scores + v * L, load(scores + v * L) * (own[v] * splat<T>(rest_[j])));
  }

  /// Rounds a panel of weights W[columns][NR] from tile t0 on: `down` takes pairs of columns, times what is left of
  /// y's normalisation, `along` pairs of rows, times `factor` (or 1) and what is left of x's. Each is half of W.
  void round(int64_t t0, int64_t columns, const T* weights, const T* factor, const T* rests, T* down, T* along) const {
    Vec<T> own[P::kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < P::kVectors; ++v)
      own[v] = factor ? load(factor + v * L) * load(rests + v * L) : load(rests + v * L);
    const T* rest = rest_.get() + t0 * MR;
    for (int64_t j = 0; j < columns; j += 2, weights += 2 * NR, down += NR, along += NR) {
      Vec<T> w[2][P::kVectors];
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u)
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) w[u][v] = load(weights + u * NR + v * L);
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v)
        store(down + v * L, side_by_side(w[0][v] * splat<T>(rest[j]), w[1][v] * splat<T>(rest[j + 1])));
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u) store(along + u * L, in_sequence(w[u][0] * own[0], w[u][1] * own[1]));
    }
  }

  /// Tile t of y for the product with weights.
  const T* columns(int64_t t) const { return columns_.get() + t * column_stride_; }
  int64_t column_stride() const { return column_stride_; }

 private:
  /// Row i as it is packed, zeros behind it and past the last row; returns what is left of its normalisation.
  static T read(const Source<T>& source, int64_t i, T* row) {
    const int64_t d = source.d(), stride = row_stride(d);
    if (i >= source.n()) {
      for (int64_t k = 0; k < stride; ++k) row[k] = 0;
      return 0;
    }
    source.read(i, row);
    for (int64_t k = d; k < stride; ++k) row[k] = 0;
    const T inverse = source.inverse_norm(i);
    if (!std::isnormal(inverse)) return inverse;
    uint32_t bits;
    std::memcpy(&bits, &inverse, sizeof bits);
    const T power = float_of(bits & 0x7f800000u);
    for (int64_t k = 0; k < d; ++k) row[k] *= power;
    return inverse / power;
  }

  template <int W>
  static void pack_rows(const T* rows, int64_t d, T* out) {
    const int64_t stride = row_stride(d);
    interleave<W, T>(ceil_div(d, 2), out, [&](int r, int64_t k) {
      const T* row = rows + r * stride + 2 * k;
      return in_sequence(load(row), load(row + L));
    });
  }

  int64_t steps_ = 0, tile_stride_ = 0, column_stride_ = 0;
  Buffer<T> tiles_, columns_, rest_;
};

}  // namespace
}  // namespace nearfar
