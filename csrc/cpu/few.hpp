// Rows of x so few that they would leave lanes empty. Coordinates run along the lanes in place of rows, nothing is
// packed, and a row of y is read once, where it lies.
//
// The strip pass of such rows:
//   for each chunk of columns (in parallel):    S[j][i] = scale <x_i, y_j>, cell.map: weights W
//                                               dX partial of the chunk = W^T y, its rows still in cache
//   cell.close;   dY[chunk] += W x;   dX = sum of the chunks' partials times their factors, in order
//
// Scores have the layout of a block, so cells and masks are those of the strip pass.
#pragma once

#include "cpu/strip.hpp"

namespace nearfar {
namespace {

/// Rows so few that they would leave lanes empty.
template <class T>
bool few(int64_t n, int64_t m) {
  return n < m && n <= 3 * Policy<T>::NR / 4;
}

/// Whether coordinates run along the lanes. From half a panel of rows on that pays for rows of eight vectors.
template <class T>
bool fewest(int64_t n, int64_t m, int64_t d) {
  return few<T>(n, m) && (n < Policy<T>::NR / 2 || d >= 8 * kLanes<T>);
}

/// Rows [begin, end) as whole vectors, and up to a whole vector of rows, zeros past the last: where they lie if that is
/// what they are, else in `copies`.
template <class T>
void whole_rows(const Source<T>& source, int64_t begin, int64_t end, const T** rows, T* copies) {
  const int64_t d = source.d(), stride = padded<T>(d), last = end < source.n() ? end : source.n();
  const bool in_place = d == stride && !source.normalized();
  for (int64_t j = begin; j < begin + padded<T>(end - begin); ++j, copies += stride) {
    rows[j - begin] = in_place && j < last ? source.view(j, copies) : copies;
    if (in_place && j < last) continue;
    if (j < last) source.get_new(j, copies);
    for (int64_t k = j < last ? d : 0; k < stride; ++k) copies[k] = 0;
  }
}

/// Scores of a row of x with as many of y as a vector has lanes: their sums, transposed, are one.
template <class Score, class T>
Vec<T> row_scores(int64_t stride, const T* x, const T* const* rows) {
  constexpr int L = kLanes<T>;
  const T* row[L];
  for (int u = 0; u < L; ++u) row[u] = rows[u];
  Vec<T> sum[L] = {};
  for (int64_t k = 0; k < stride; k += L) {
    const Vec<T> own = load(x + k);
#pragma GCC unroll 16
    for (int u = 0; u < L; ++u) Score::accumulate(sum[u], own, load(row[u] + k));
  }
  transpose<T>(sum);
#pragma GCC unroll 4
  for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int u = 0; u < half; ++u) sum[u] += sum[u + half];
  return sum[0];
}

/// All pairs of the `fewest` rows of x by dot products, without a triangle; y is not packed.
template <class T, class Cell>
class FewPass {
  using P = Policy<T>;
  static constexpr int NR = P::NR, L = kLanes<T>;

 public:
  FewPass(const Operands<T>& operands, Cell& cell, const StripPlan<T>& plan)
      : o_(operands),
        cell_(cell),
        plan_(plan),
        n_(o_.x.n()),
        d_(o_.d),
        stride_(padded<T>(d_)),
        keeps_(plan.two_phase && plan.dy),
        size_(o_.chunks.tiles_each * P::MR),
        x_(NR * stride_) {
    const int64_t count = o_.chunks.count, workers = worker_count(count, plan.threads);
    read_rows<NR>(o_.x, 0, x_.get());
    blocks_ = Buffer<T>((keeps_ ? count : workers) * size_ * NR);
    rows_ = Buffer<const T*>(workers * (size_ + L));
    copies_ = Buffer<T>(workers * (size_ + L) * stride_);
    if (plan.dx) partial_ = Buffer<T>(count * n_ * stride_);
  }

  void run() {
    const int64_t count = o_.chunks.count;
    parallel_for(count, plan_.threads, [&](int64_t chunk, int worker) {
      const Block<T> block = view(chunk, worker);
      const T** rows = rows_.get() + worker * (size_ + L);
      whole_rows(o_.y, block.column, block.column + block.columns, rows,
                 copies_.get() + worker * (size_ + L) * stride_);
      scores(block, rows);
      cell_.map(block);
      if (plan_.dx) multiply_rows(block, rows, partial_.get() + chunk * n_ * stride_);
      if (plan_.dy && !keeps_) multiply_x(block, nullptr);
    });
    cell_.close(0, n_, count);
    if (keeps_)
      parallel_for(count, plan_.threads,
                   [&](int64_t chunk, int worker) { multiply_x(view(chunk, worker), cell_.factor(chunk)); });
    for (int64_t chunk = 0; plan_.dx && chunk < count; ++chunk)
      for (int64_t i = 0; i < n_; ++i) {
        const T *sum = partial_.get() + (chunk * n_ + i) * stride_, *factor = cell_.factor(chunk);
        for (int64_t k = 0; k < d_; ++k) plan_.dx[i * d_ + k] += factor ? factor[i] * sum[k] : sum[k];
      }
  }

 private:
  Block<T> view(int64_t chunk, int worker) const {
    const int64_t t0 = o_.chunks.tile_begin(chunk), t1 = o_.chunks.tile_end(chunk);
    T* data = blocks_.get() + (keeps_ ? chunk : worker) * size_ * NR;
    return {chunk, chunk, 0, 1, t0 * P::MR, (t1 - t0) * P::MR, data, size_ * NR, nullptr, nullptr};
  }

  void scores(const Block<T>& b, const T* const* rows) const {
    for (int64_t at = 0; at < b.columns * NR; at += L) store(b.data + at, Vec<T>{});
    for (int64_t j = 0; j < b.columns; j += L)
      for (int64_t i = 0; i < n_; ++i) {
        const Vec<T> score = row_scores<Dot>(stride_, x_.get() + i * stride_, rows + j) * splat<T>(plan_.scale);
        for (int u = 0; u < L && j + u < b.columns; ++u) b.data[(j + u) * NR + i] = score[u];
      }
  }

  /// out_i = sum_j W[j][i] y_j
  void multiply_rows(const Block<T>& w, const T* const* rows, T* out) const {
    for (int64_t k = 0; k < n_ * stride_; ++k) out[k] = 0;
    for (int64_t j = 0; j < w.columns; j += L) {
      const T* row[L];
      for (int u = 0; u < L; ++u) row[u] = rows[j + u];
      for (int64_t i = 0; i < n_; ++i) {
        Vec<T> weight[L];
#pragma GCC unroll 16
        for (int u = 0; u < L; ++u) weight[u] = splat<T>(j + u < w.columns ? w.data[(j + u) * NR + i] : T(0));
        for (int64_t k = 0; k < stride_; k += L) {
          Vec<T> sum = load(out + i * stride_ + k);
#pragma GCC unroll 16
          for (int u = 0; u < L; ++u) sum += weight[u] * load(row[u] + k);
          store(out + i * stride_ + k, sum);
        }
      }
    }
  }

  /// dY_j += sum_i W[j][i] factor_i x_i
  void multiply_x(const Block<T>& w, const T* factor) const {
    for (int64_t j = 0; j < w.columns && w.column + j < o_.y.n(); ++j) {
      T weight[NR], *out = plan_.dy + (w.column + j) * d_;
      for (int64_t i = 0; i < n_; ++i) weight[i] = factor ? factor[i] * w.data[j * NR + i] : w.data[j * NR + i];
      for (int64_t k = 0; k < d_; k += L) {
        Vec<T> sum = Vec<T>{};
        for (int64_t i = 0; i < n_; ++i) sum += splat<T>(weight[i]) * load(x_.get() + i * stride_ + k);
        if (k + L <= d_) {
          store(out + k, load(out + k) + sum);
        } else {
          for (int64_t u = 0; k + u < d_; ++u) out[k + u] += sum[u];
        }
      }
    }
  }

  const Operands<T>& o_;
  Cell& cell_;
  const StripPlan<T> plan_;
  const int64_t n_, d_, stride_;
  const bool keeps_;    // weights, until their factors are known
  const int64_t size_;  // columns of a chunk
  Buffer<T> x_, blocks_, copies_, partial_;
  Buffer<const T*> rows_;
};

/// All pairs, by the pass that fits: where y is not packed, rows of x are few.
template <class T, class Cell>
void all_pairs(const Operands<T>& o, Cell& cell, const StripPlan<T>& plan) {
  o.packed() ? StripPass<T, Cell>(o, cell, plan).run() : FewPass<T, Cell>(o, cell, plan).run();
}

}  // namespace
}  // namespace nearfar
