// Both point sets as bfloat16 numbers, two a lane, for the products of such rows (bfloat16.hpp): their scores, and with
// weights rounded to bfloat16 their gradients, each in half the time of float32.
//
//   scores   S[j][i]   = sum_k y[j][k] x[k][i]      y tiles [k/2][MR],  x panel [k/2][NR]       two coordinates a lane
//   dx       dX[k][i] += sum_j y[j][k] W[j][i]      y tiles [k][MR/2],  W [j/2][NR]             two columns
//   dy       dY[j][k] += sum_i W[j][i] x[i][k]      W [j][NR/2],        x rows [i/2][NR of k]   two rows
//
// Normalised rows would not be bfloat16 numbers, so they are packed as given, times a power of two that brings the norm
// to (1/2, 1]: exact, and no product leaves the range of float32. The rest of the normalisation, in [1, 2) (1 where
// there is none), multiplies scores, and of gradients the weights before they are rounded.
//
// Weights that are alike round alike, and where gradients are small because rows are, that would be all that is left of
// them. So what rounding takes from a row or column of weights is summed, and enters times the mean of the rows that it
// would have met: errors are those of rows about their mean.
#pragma once

#include "cpu/tile.hpp"

namespace nearfar {
namespace {

class Halves {
  using T = float;
  using P = Policy<T>;
  static constexpr int NR = P::NR, MR = P::MR, L = kLanes<T>;

 public:
  /// Whether such rows are multiplied so. Shorter ones leave little to save; smaller problems take less than a
  /// millisecond anyway, and keep the bits of the same rows in float32.
  static bool serve(const Rows& x, const Rows& y) {
    constexpr int64_t kLeastDims = 16;
    constexpr double kLeastWork = 1 << 24;
    const double work = static_cast<double>(x.n) * static_cast<double>(y.n) * static_cast<double>(x.d);
    return x.dtype == DType::bf16 && y.dtype == DType::bf16 && x.d >= kLeastDims && work >= kLeastWork;
  }

  Halves() = default;

  /// products: both are multiplied by weights too.
  Halves(const Source<T>& x, const Source<T>& y, int64_t tiles, bool products, int threads)
      : steps_(ceil_div(y.d(), 2)),
        tile_stride_(steps_ * MR),
        column_stride_(ceil_div(y.d(), MR) * MR * (MR / 2)),
        tiles_(tiles * tile_stride_),
        columns_(products ? tiles * column_stride_ : 0),
        rests_(tiles * MR),
        mean_x_(products ? x.d() : 0),
        mean_y_(products ? y.d() : 0) {
    static_assert(MR % 2 == 0 && P::kVectors == 2 && NR == 2 * L, "two columns, two rows, two vectors at once");
    if (products) mean(x, mean_x_.get()), mean(y, mean_y_.get());
    for_tiles(tiles, threads, [&](int64_t first, int64_t last) {
      const int64_t d = y.d(), stride = row_stride(d);
      Buffer<T> buffer(MR * stride);
      const T* rows = buffer.get();
      for (int64_t t = first; t < last; ++t) {
        for (int r = 0; r < MR; ++r) rests_[t * MR + r] = read(y, t * MR + r, buffer.get() + r * stride);
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
  /// and every `next` values behind it. `rests` takes theirs.
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
    score_block<HalvesDot>(steps_, t1 - t0, tiles_.get() + t0 * tile_stride_, tile_stride_, panel, scores);
    Vec<T> own[2];
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) own[v] = load(rests + v * L) * splat<T>(scale);
    for (int64_t j = t0 * MR; j < t1 * MR; ++j, scores += NR)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) store(scores + v * L, load(scores + v * L) * (own[v] * splat<T>(rests_[j])));
  }

  /// Rounds a block of weights: `down` takes two columns a lane, times the rests of y, `along` two rows, times `factor`
  /// (or 1) and the rests of x. Panels of each are half as long as the block's. What rounding took is added to the sums
  /// of rows (times factor) and of the first m columns. along: null where dY is not wanted.
  template <class Block>
  void round_weights(const Block& w, int64_t m, const T* factor, const T* rests, T* down, T* along, T* row_sums,
                     double* column_sums) const {
    Vec<T> of_rows[P::kPanels][2] = {};
    for (int64_t j = 0; j < w.columns; j += 2) {
      const T* other = rests_.get() + w.column + j;
      Vec<T> of_columns[2] = {};
      for (int64_t p = 0; p < w.panels; ++p) {
        const T* weights = w.panel(p) + j * NR;
        const int64_t place = (p * w.panel_stride + j * NR) / 2;
        Vec<T> own[2];
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int64_t lane = p * NR + v * L;
          const Vec<T> first = load(weights + v * L) * splat<T>(other[0]),
                       second = load(weights + NR + v * L) * splat<T>(other[1]);
          const Vec<T> a = to_bfloat16(first), b = to_bfloat16(second);
          of_rows[p][v] += (first - a) + (second - b);
          store(down + place + v * L, side_by_side(a, b));
          own[v] = factor ? load(factor + lane) * load(rests + lane) : load(rests + lane);
        }
        if (!along) continue;
#pragma GCC unroll 2
        for (int u = 0; u < 2; ++u) {
          const Vec<T> first = load(weights + u * NR) * own[0], second = load(weights + u * NR + L) * own[1];
          const Vec<T> a = to_bfloat16(first), b = to_bfloat16(second);
          of_columns[u] += (first - a) + (second - b);
          store(along + place + u * L, in_sequence(a, b));
        }
      }
      for (int u = 0; along && u < 2 && w.column + j + u < m; ++u)
        column_sums[w.column + j + u] += static_cast<double>(hsum<T>(of_columns[u]));
    }
    for (int64_t i = 0; i < w.panels * NR; i += L) {
      const Vec<T> sum = of_rows[i / NR][i % NR / L];
      store(row_sums + i, load(row_sums + i) + (factor ? sum * load(factor + i) : sum));
    }
  }

  /// Tile t of y for the product with weights.
  const T* columns(int64_t t) const { return columns_.get() + t * column_stride_; }
  int64_t column_stride() const { return column_stride_; }

  /// Of the rows as they are packed, about.
  const T* mean_x() const { return mean_x_.get(); }
  const T* mean_y() const { return mean_y_.get(); }

 private:
  /// Row i as it is packed, zeros behind it and past the last row; returns its rest.
  static T read(const Source<T>& source, int64_t i, T* row) {
    const int64_t d = source.d(), stride = row_stride(d);
    if (i >= source.n()) {
      for (int64_t k = 0; k < stride; ++k) row[k] = 0;
      return 0;
    }
    source.read(i, row);
    for (int64_t k = d; k < stride; ++k) row[k] = 0;
    const T inverse = source.inverse_norm(i);
    const bool normal = std::isnormal(inverse);  // else the row is zero, or taken for zero, or not finite
    uint32_t bits;
    std::memcpy(&bits, &inverse, sizeof bits);
    const T power = normal ? float_of(bits & 0x7f800000u) : inverse;
    for (int64_t k = 0; k < d; ++k) row[k] *= power;
    return normal ? inverse / power : T(1);
  }

  /// Of some rows, evenly spaced, that are finite: any common point will do.
  static void mean(const Source<T>& source, T* mean) {
    constexpr int64_t kMost = 256;
    const int64_t d = source.d(), step = ceil_div(source.n(), kMost);
    Buffer<T> row(row_stride(d));
    for (int64_t k = 0; k < d; ++k) mean[k] = 0;
    T count = 0;
    for (int64_t i = 0; i < source.n(); i += step) {
      read(source, i, row.get());
      if (!std::isfinite(Source<T>::dot(row.get(), row.get(), d))) continue;
      for (int64_t k = 0; k < d; ++k) mean[k] += row[k];
      ++count;
    }
    for (int64_t k = 0; count > 0 && k < d; ++k) mean[k] /= count;
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
  Buffer<T> tiles_, columns_, rests_, mean_x_, mean_y_;
};

}  // namespace
}  // namespace nearfar
