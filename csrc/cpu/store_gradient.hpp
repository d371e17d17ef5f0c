// The gradient through the matrix of a map, where a product makes it: weights from the upstream gradient and the
// values.
//
// Columns of the matrix run along the lanes, as in the result, so y is the pass's x. Where y is x a pair has the
// weights of both its orders, and a triangle is all there is to multiply.
#pragma once

#include "cpu/ops.hpp"
#include "cpu/strip.hpp"

namespace nearfar {
namespace {

/// Where row i of the result begins; (i, j) is at(i)[j].
template <class A>
A* row_of(A* base, int64_t i, int64_t columns, bool condensed) {
  return condensed ? base + i * (2 * columns - i - 1) / 2 - i - 1 : base + i * columns;
}

constexpr int64_t kAhead = 8;  // rows of a matrix of all pairs, which lie far apart: no prefetcher follows them

template <class T>
void fetch(const T* from, int64_t count) {
  for (int64_t k = 0; k < count; k += kCacheLine<T>) __builtin_prefetch(from + k);
}

/// What both roles of a point have as upstream gradient, where y is x: to[c][lane] = g_ij + g_ji for i = i0 + c and
/// j = j0 + lane of the pairs i < j, g_ii on the diagonal, else 0.
template <class T>
void both_ways(const T* g, int64_t n, int64_t i0, int64_t columns, int64_t j0, T* to) {
  constexpr int L = kLanes<T>, NR = Policy<T>::NR;
  for (int64_t c = 0; c < columns; c += L) {
    const int64_t i = i0 + c, count = columns - c < L ? columns - c : L;
    for (int64_t u = 0; c + L < columns && u < L && i + L + u < n; ++u)
      fetch(g + (i + L + u) * n + j0, n - j0 < NR ? n - j0 : NR);
    for (int64_t lane = 0; lane < NR; lane += L, to += L) {
      const int64_t j = j0 + lane;
      if (i + L <= j && j + L <= n) {
        Vec<T> turned[L];
#pragma GCC unroll 16
        for (int u = 0; u < L; ++u) turned[u] = load(g + (j + u) * n + i);
        transpose<T>(turned);
#pragma GCC unroll 16
        for (int u = 0; u < L; ++u)
          if (u < count) store(to + u * NR, turned[u] + load(g + (i + u) * n + j));
        continue;
      }
      for (int64_t u = 0; u < count; ++u)
        for (int64_t k = 0; k < L; ++k) {
          const int64_t a = i + u, b = j + k;
          to[u * NR + k] = b >= n || a > b ? T(0) : a == b ? g[a * n + a] : g[a * n + b] + g[b * n + a];
        }
    }
    to += (L - 1) * NR;
  }
}

/// Weights of the gradient: the upstream gradient times the pull of the map.
template <class T, class Map>
struct StoreGradCell {
  using P = Policy<T>;
  static constexpr bool kScores = false;

  void map(const Block<T>& b) {
    if (b.near) b.near->base = 0;
    for (int64_t panel = 0; both_orders() && panel < b.panels; ++panel)
      both_ways(p.grad, n, b.column, b.columns_below(panel), b.row + panel * P::NR, b.panel(panel));
    const int64_t end = b.row + b.panels * P::NR < m ? b.row + b.panels * P::NR : m;
    for (int64_t c = 0; c < b.columns; ++c) {
      const int64_t i = b.column + c;
      if (i + kAhead < n && c + kAhead < b.columns) {
        if (!both_orders()) fetch(row_of(p.grad, i + kAhead, m, p.condensed) + b.row, end - b.row);
        if (Map::kDistance) fetch(row_of(p.out, i + kAhead, m, p.condensed) + b.row, end - b.row);
      }
      for (int64_t panel = 0; panel < b.panels; ++panel) weights(b, i, panel, panel * b.panel_stride + c * P::NR);
    }
  }

  /// Whether the weights are those of both orders of a pair.
  bool both_orders() const { return p.same && !p.condensed; }

  /// Row i of the result against one panel of its columns. Scores are not computed again: the values tell which pairs
  /// are near. A point is at distance 0 from itself wherever it lies.
  void weights(const Block<T>& b, int64_t i, int64_t panel, int64_t place) const {
    const int64_t j0 = b.row + panel * P::NR;
    T* w = b.data + place;
    const int64_t end = i >= n ? 0 : (m - j0 < P::NR ? m - j0 : P::NR);
    const int64_t begin = p.same && i >= j0 ? i - j0 + (p.condensed || Map::kDistance ? 1 : 0) : 0;
    const T* grad = both_orders() ? w : row_of(p.grad, i, m, p.condensed) + j0;
    const T* value = row_of(p.out, i, m, p.condensed) + j0;
    alignas(64) T own[P::NR], upstream[P::NR];
    if (begin > 0 || end < P::NR) {
      // No pair: NaN is near to nothing, and a weight of 0.
      for (int64_t lane = 0; lane < P::NR; ++lane) {
        const bool inside = lane >= begin && lane < end;
        own[lane] = inside ? value[lane] : std::numeric_limits<T>::quiet_NaN();
        upstream[lane] = inside ? grad[lane] : 0;
      }
      value = own;
      grad = upstream;
    }
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> of_value = Map::kDistance ? load(value + v * kLanes<T>) : Vec<T>{};
      store(w + v * kLanes<T>, load(grad + v * kLanes<T>) * Map::pull(of_value));
    }
    for (int64_t lane = 0; value == own && lane < P::NR; ++lane)
      if (lane < begin || lane >= end) w[lane] = 0;
    if constexpr (Map::kDistance) {
      if (begin < end)
        o.near_lanes(
            i, b.squares + panel * P::NR, end, [&](int v) { return Map::score(load(value + v * kLanes<T>)); }, place,
            *b.near);
    }
  }

  void close(int64_t, int64_t, int64_t) {}
  const T* factor(int64_t) const { return nullptr; }

  const StoreGradParams<T>& p;
  const Operands<T>& o;
  int64_t n, m;
};

template <class T, class Map>
void gradient(const StoreGradParams<T>& p) {
  Operands<T> o(p.y, p.x, p.normalize, Map::kDistance, true, p.threads);
  StoreGradCell<T, Map> cell{p, o, p.x.n, p.y.n};
  const int64_t apart = p.same ? p.y.n * p.y.d : 0;  // of columns, where those of rows go to the result
  Buffer<T> columns(apart);
  for (int64_t k = 0; k < apart; ++k) columns[k] = 0;
  StripPlan<T> plan;
  plan.triangle = p.same;
  plan.threads = p.threads;
  plan.dx = p.dy;
  plan.dy = p.same ? columns.get() : p.dx;
  StripPass<T, StoreGradCell<T, Map>>(o, cell, plan).run();
  for (int64_t k = 0; k < apart; ++k) p.dx[k] += columns[k];
  if (!p.normalize) return;
  if (p.dy) finish_gradient(o.x, 1, p.threads, p.dy);
  if (p.dx && !p.same) finish_gradient(o.y, 1, p.threads, p.dx);
}

}  // namespace
}  // namespace nearfar
