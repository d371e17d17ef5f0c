// Gradients of metrics of |x_k - y_k|: dx_i[k] = sum_j pull(x_i[k], y_j[k], g_ij, ...). No matrix product: a direct
// kernel, with rows along the lanes. A task owns a panel of rows and adds its columns in order.
#pragma once

#include "cpu/tile.hpp"

namespace nearfar {
namespace {

template <class T, class Map>
struct CoordinateGradient {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr int kTogether = 4;      // columns for each load and store of a sum
  static constexpr int64_t kColumns = 64;  // a block of pairs stays in L1

  Rows of, others;
  Map map;
  int threads;

  /// Adds to out (of.n, d); `pair(i, j, grad, value)` gives the upstream gradient and the distance of a pair.
  template <class F>
  void run(F pair, T* out) const {
    const Source<T> x(of), y(others);
    const int64_t n = x.n(), m = y.n(), d = x.d();
    parallel_for(ceil_div(n, NR), threads, [&](int64_t task, int) {
      const int64_t row = task * NR, lanes = n - row < NR ? n - row : NR;
      Buffer<T> rows(NR * padded<T>(d)), panel(NR * d), block(NR * d), total(NR * d), columns(kColumns * d);
      Buffer<T> grad(kColumns * NR), aside(kColumns * NR);
      read_rows<NR>(x, row, rows.get());
      pack<NR>(rows.get(), d, T(1), panel.get());
      for (int64_t k = 0; k < NR * d; ++k) total[k] = 0;
      for (int64_t j0 = 0; j0 < m; j0 += kColumns) {
        const int64_t count = m - j0 < kColumns ? m - j0 : kColumns;
        for (int64_t j = 0; j < count; ++j) {
          y.get(j0 + j, columns.get() + j * d);
          for (int64_t lane = 0; lane < NR; ++lane) {
            T *g = grad.get() + j * NR + lane, *value = aside.get() + j * NR + lane;
            *g = *value = 0;
            if (lane < lanes) pair(row + lane, j0 + j, *g, *value);
          }
          for (int v = 0; v < P::kVectors; ++v) {
            T* value = aside.get() + j * NR + v * kLanes<T>;
            store(value, map.aside(load(value)));
          }
        }
        for (int64_t k = 0; k < NR * d; ++k) block[k] = 0;
        for (int v = 0; v < P::kVectors; ++v) {
          int64_t j = 0;
          for (; j + kTogether <= count; j += kTogether)
            add<kTogether>(d, panel.get() + v * kLanes<T>, columns.get() + j * d, grad.get() + j * NR + v * kLanes<T>,
                           aside.get() + j * NR + v * kLanes<T>, block.get() + v * kLanes<T>);
          for (; j < count; ++j)
            add<1>(d, panel.get() + v * kLanes<T>, columns.get() + j * d, grad.get() + j * NR + v * kLanes<T>,
                   aside.get() + j * NR + v * kLanes<T>, block.get() + v * kLanes<T>);
        }
        for (int64_t k = 0; k < NR * d; ++k) total[k] += block[k];
      }
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t k = 0; k < d; ++k) {
          const T own = panel[k * NR + lane];
          out[(row + lane) * d + k] += own == own ? total[k * NR + lane] : own;
        }
    });
  }

  template <int J>
  NEARFAR_INLINE void add(int64_t d, const T* panel, const T* columns, const T* grad, const T* aside, T* sum) const {
    Vec<T> g[J], a[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) {
      g[j] = load(grad + j * NR);
      a[j] = load(aside + j * NR);
    }
    for (int64_t k = 0; k < d; ++k) {
      const Vec<T> own = load(panel + k * NR);
      Vec<T> total = load(sum + k * NR);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j) total += map.pull(own, splat<T>(columns[j * d + k]), g[j], a[j]);
      store(sum + k * NR, total);
    }
  }
};

}  // namespace
}  // namespace nearfar
