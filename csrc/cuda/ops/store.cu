// Store: the whole matrix of a map, and the gradient through it. Here, and only here, the matrix exists: it is the
// result.
#include "cuda/coordinate.hpp"
#include "cuda/ops.hpp"

namespace nearfar {
namespace {

/// Where column 0 of row i of the result would lie.
NEARFAR_DEVICE int64_t line_of(int64_t i, int64_t columns, bool condensed) {
  return condensed ? i * (2 * columns - i - 1) / 2 - i - 1 : i * columns;
}
NEARFAR_DEVICE int64_t place_of(int64_t i, int64_t j, int64_t columns, bool condensed) {
  return line_of(i, columns, condensed) + j;
}

/// Where the result lies.
template <class T>
struct Result {
  bool condensed;
  int64_t n, m;
  T* out;

  NEARFAR_DEVICE bool wants(int64_t i0, int64_t j0, int, int tile_n) const { return !condensed || j0 + tile_n > i0; }
  NEARFAR_DEVICE bool inside(int64_t i, int64_t j) const { return i < n && j < m && (!condensed || i < j); }
  template <class P>
  NEARFAR_DEVICE uint64_t hidden(const Fragment<P>& f) const {
    const bool whole = f.i0 + P::kM <= n && f.j0 + P::kN <= m && (!condensed || f.i0 + P::kM <= f.j0);
    return f.without(whole, [&](int64_t i, int64_t j) { return inside(i, j); });
  }
  template <class P>
  NEARFAR_DEVICE void store(const Fragment<P>& f, uint64_t hidden) const {
    f.store(hidden, [&](int a) { return out + line_of(f.i(a), m, condensed) + f.j0; });
  }
};

template <class T>
struct StoreMap : Result<T> {
  static constexpr bool kDistances = true;
  Scores<T> scores;
  PairMap map;
  bool same;

  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    const uint64_t hidden = this->hidden(f);
    scores.apply(f, f.i0, f.j0, hidden);
    if (map != PairMap::dot && map != PairMap::sqeuclidean)
      f.for_each([&](int64_t, int64_t, T& value) { value = map_value(map, value); });
    if (map == PairMap::one_minus_dot) measure_near(f, hidden);
    this->store(f, hidden);
  }
  /// 1 - <u, v> loses what it measures when u is near v; half the squared difference of the unit rows does not. A zero
  /// row is at distance 1 from every row but itself.
  template <class P>
  NEARFAR_DEVICE void measure_near(const Fragment<P>& f, uint64_t hidden) const {
    const uint64_t near =
        f.find([&](int a, int b) { return f(a, b) <= scores.near_part || (same && f.i(a) == f.j(b) && f(a, b) == 1); });
    f.for_bits(near & ~hidden, [&](int a, int b) { f.set(a, b, scores.measure(f.i(a), f.j(b)) / 2); });
  }
};

/// The same of a metric of coordinates.
template <class T, class Map>
struct StoreCoordinates : Result<T> {
  Map map;
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    f.for_each([&](int64_t, int64_t, T& score) { score = map.value(score); });
    this->store(f, this->hidden(f));
  }
};

/// Weights of the gradient: the upstream gradient times the pull of the map. Scores are not computed again: the values
/// tell which pairs are near.
template <class T>
struct StoreWeights {
  Weights<T> weights;
  Scores<T> scores;
  PairMap map;
  bool same, condensed;
  int64_t n, m;
  const T *value, *grad;

  NEARFAR_DEVICE void operator()() const {
    const Block& b = weights.block;
    const int64_t at = cuda::global_thread(), i = b.row + at / b.columns, j = b.column + at % b.columns;
    if (i >= b.row + b.rows) return;  // whole warps: rows of a block are whole warps
    T w = 0;
    bool near = false;
    // A point is at distance 0 from itself, whatever its upstream gradient is.
    if (i < n && j < m && (!condensed || i < j) && !(same && scores.distance && i == j)) {
      const int64_t place = place_of(i, j, m, condensed);
      const T own = scores.distance ? value[place] : T(0);
      w = grad[place] * map_pull(map, own);
      near = scores.distance && scores.near(i, j, map_score(map, own));
    }
    weights.at(i, j) = w;
    if (!weights.near) return;
    const uint32_t bits = cuda::ballot(near);
    if (cuda::lane_index() == 0) *weights.word(i, j) = bits;
  }
};

/// Gradient and value of the pair (own, other) of a metric of coordinates; `turned`: own is the second set. Condensed,
/// every row has both roles, and a row is no pair with itself.
template <class T>
struct StoredPair {
  int64_t m;
  bool condensed, turned;
  const T *value, *grad;
  NEARFAR_DEVICE void operator()(int64_t own, int64_t other, T& g, T& v) const {
    g = v = 0;
    if (condensed && own == other) return;
    const bool turn = condensed ? own > other : turned;
    const int64_t place = place_of(turn ? other : own, turn ? own : other, m, condensed);
    g = grad[place];
    v = value[place];
  }
};

template <class T>
void store_coordinates(cuda::Context& c, const StoreParams<T>& p) {
  const Pairs<T, T> pairs(c, p.x, p.y, false, false, false, false, PairUse::rows);
  with_coordinate_map(p.map, p.power, [&](auto map) {
    launch_coordinates(c, map.score, pairs, pairs.all(),
                       StoreCoordinates<T, decltype(map)>{{p.condensed, p.x.n, p.y.n, p.out}, map});
  });
}

template <class T>
void store_coordinates_grad(cuda::Context& c, const StoreGradParams<T>& p) {
  const Pairs<T, T> pairs(c, p.x, p.y, false, false, false, false, PairUse::rows);
  const int64_t n = p.x.n, m = p.y.n;
  with_coordinate_map(p.map, p.power, [&](auto map) {
    StoredPair<T> of{m, p.condensed, false, p.out, p.grad};
    add_coordinate_gradient(c, map, of, pairs.x, pairs.y, 0, n, 0, m, p.dx);
    of.turned = true;
    if (p.dy && !p.condensed) add_coordinate_gradient(c, map, of, pairs.y, pairs.x, 0, m, 0, n, p.dy);
  });
}

}  // namespace

namespace cuda {

template <class T>
void store(Context& c, const StoreParams<T>& p) {
  if (by_coordinate(p.map)) return store_coordinates(c, p);
  const bool distance = is_distance(p.map);
  with_element<T>(p.x.dtype, distance, [&](auto element) {
    const Pairs<T, decltype(element)> pairs(c, p.x, p.y, p.normalize, distance, false);
    const Plan plan = plan_scores(c, "store", pairs, pairs.all());
    launch_scores(c, plan, pairs, pairs.all(),
                  StoreMap<T>{{p.condensed, p.x.n, p.y.n, p.out}, pairs.scores, p.map, p.same});
  });
}

template <class T>
void store_grad(Context& c, const StoreGradParams<T>& p) {
  if (by_coordinate(p.map)) return store_coordinates_grad(c, p);
  const bool distance = is_distance(p.map);
  with_element<T>(p.x.dtype, distance, [&](auto element) {
    const Pairs<T, decltype(element)> pairs(c, p.x, p.y, p.normalize, distance, true, false, PairUse::rows);
    Strip<T, decltype(element)> strip(c, pairs, false, true, p.dx, p.dy);
    strip.for_blocks([&](const Weights<T>& weights) {
      const Block& b = weights.block;
      if (p.condensed && b.column + b.columns <= b.row) return;
      c.launch_threads(b.rows * b.columns,
                       StoreWeights<T>{weights, pairs.scores, p.map, p.same, p.condensed, p.x.n, p.y.n, p.out, p.grad});
      strip.products(weights);
    });
    if (!p.normalize) return;
    finish_rows(c, pairs.scores.x, p.dx, FinishRows<T>{{}, nullptr, {}, nullptr, 1, nullptr});
    if (p.dy && !p.same) finish_rows(c, pairs.scores.y, p.dy, FinishRows<T>{{}, nullptr, {}, nullptr, 1, nullptr});
  });
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(store, StoreParams)
NEARFAR_INSTANTIATE(store_grad, StoreGradParams)
