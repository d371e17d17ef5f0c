// Matrices of a map, and gradients through them, of problems that go together.
#pragma once

#include <limits>
#include <type_traits>

#include "cpu/together.hpp"

namespace nearfar {
namespace {

/// 1 - <u, v> loses what it measures when u is near v; half the squared difference of the unit rows does not. A zero
/// row is at distance 1 from every row but itself.
template <class T>
Vec<T> mended_cosine(Vec<T> value, const Turned<T>& x, const Turned<T>& y, int64_t i, int64_t j, bool itself) {
  if (itself) value = select(value == T(1), Vec<T>{}, value);
  const auto near = value <= Operands<T>::kNear;
  if (!any(near)) return value;
  Vec<T> square{};
  for (int64_t k = 0; k < x.d * kLanes<T>; k += kLanes<T>)
    SquaredDifference::accumulate(square, load(x.row(i) + k), load(y.row(j) + k));
  return select(near, square / T(2), value);
}

/// The matrices of a map for as many problems as there are lanes.
template <class T, class Map>
void store_together(const StoreParams<T>* p, int64_t count, const Map& map) {
  constexpr int L = kLanes<T>;
  const Turned<T> x(count, [&](int u) { return p[u].x; }, p->normalize);
  const Turned<T> y(count, [&](int u) { return p[u].y; }, p->normalize);
  Buffer<T> pairs(x.n * y.n * L);
  if constexpr (std::is_base_of_v<CoordinateMap, Map>) {
    scores_of(x, y, pairs.get(), map.score);
  } else {
    scores_of(x, y, pairs.get(), std::conditional_t<Map::kDistance, SquaredDifference, Dot>{});
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < x.n; ++i)
    for (int64_t j = p->condensed ? i + 1 : 0; j < y.n; ++j, ++kept) {
      Vec<T> value = map.value(load(pairs.get() + (i * y.n + j) * L));
      if constexpr (std::is_same_v<Map, OneMinusDotMap>) value = mended_cosine(value, x, y, i, j, p->same && i == j);
      store(pairs.get() + kept * L, value);
    }
  turn_back<false>(count, kept, pairs.get(), [&](int u) { return p[u].out; });
}

/// The gradient of sum_ij grad[i, j] * map(x_i, y_j) of as many.
template <class T, class Map>
void gradient_together(const StoreGradParams<T>* p, int64_t count, const Map& map) {
  constexpr int L = kLanes<T>;
  const int64_t n = p->x.n, m = p->y.n, given = p->condensed ? n * (n - 1) / 2 : n * m;
  const Turned<T> x(count, [&](int u) { return p[u].x; }, p->normalize);
  const Turned<T> y(count, [&](int u) { return p[u].y; }, p->normalize);
  const Turned<T> grad(count, [&](int u) { return row_of_numbers(p[u].grad, given); });
  const Turned<T> values(count, [&](int u) { return row_of_numbers(p[u].out, given); });
  Buffer<T> weights(n * m * L), asides(n * m * L);
  T *weight = weights.get(), *aside = asides.get();
  for (int64_t i = 0, at = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j, weight += L, aside += L) {
      const bool none = p->condensed && j <= i;
      const Vec<T> upstream = none ? Vec<T>{} : load(grad.data() + at);
      const Vec<T> value = none ? splat(std::numeric_limits<T>::quiet_NaN()) : load(values.data() + at);  // slope 0
      at += none ? 0 : L;
      if constexpr (std::is_base_of_v<CoordinateMap, Map>) {
        store(weight, upstream);
        store(aside, map.aside(value));
      } else {
        // As where problems go alone: a point is at distance 0 from itself, whatever its upstream gradient is.
        const bool self = Map::kDistance && p->same && i == j;
        store(weight, self ? Vec<T>{} : upstream * Map::pull(value));
      }
    }
  const auto add = [&](const auto& by) {
    add_gradients(count, x, y, by, x.d, [&](int u) { return p[u].dx; }, [&](int u) { return p[u].dy; });
  };
  if constexpr (std::is_base_of_v<CoordinateMap, Map>) {
    add([&](const T* own, Vec<T> other, int64_t place) {
      const Vec<T> point = load(own);
      const Vec<T> pull = map.pull(point, other, load(weights.get() + place), load(asides.get() + place));
      return select(point == point, pull, point);  // a NaN stays
    });
  } else if constexpr (Map::kDistance) {
    add(times_difference(weights.get()));
  } else {
    add(times_other(weights.get()));
  }
}

}  // namespace
}  // namespace nearfar
