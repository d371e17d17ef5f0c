// Select: for every row the k best columns. k-means assignment (k = 1) and k nearest neighbours.
//
// Keys go to a strip; a warp scans a row of it in ascending order and keeps the 32 best so far in its lanes, so ties go
// to the lower index. More than 32 are found 32 at a time. The kept candidates are then measured again from the
// original rows and sorted by (value, index).
#include "cuda/coordinate.hpp"
#include "cuda/ops.hpp"

namespace nearfar {
namespace {

/// Where keys go, and which pairs have one: +inf where a column is not to be chosen.
template <class T>
struct Keys {
  bool exclude_self;
  int64_t n, m;
  Weights<T> strip;

  NEARFAR_DEVICE int64_t row(int64_t i) const { return strip.block.row + i; }
  NEARFAR_DEVICE int64_t column(int64_t j) const { return strip.block.column + j; }
  NEARFAR_DEVICE bool inside(int64_t i, int64_t j) const {
    return row(i) < n && column(j) < m && !(exclude_self && row(i) == column(j));
  }
  NEARFAR_DEVICE T& at(int64_t i, int64_t j) const { return strip.w[i * strip.pitch + j]; }
};

/// What is minimised: the squared distance, 1 - <u, v> of unit rows, or the negative dot product.
template <class T>
struct KeyEpilogue {
  static constexpr bool kDistances = true;
  Keys<T> keys;
  Scores<T> scores;
  PairMap map;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    auto key = [&](int64_t i, int64_t j, T product) {
      const T score = scores(keys.row(i), keys.column(j), product);
      return map == PairMap::dot ? -score : map == PairMap::one_minus_dot ? 1 - score : score;
    };
    f.for_each(
        [&](int64_t i, int64_t j, T product) {
          if (!keys.inside(i, j)) return false;
          const T own = key(i, j, product);
          return map == PairMap::one_minus_dot ? own <= scores.near_part
                                               : scores.must_measure(keys.row(i), keys.column(j), own);
        },
        [&](int64_t i, int64_t j, T product) {
          keys.at(i, j) = keys.inside(i, j) ? key(i, j, product) : infinity<T>();
        },
        [&](int64_t i, int64_t j) {
          const T square = scores.measure(keys.row(i), keys.column(j));
          keys.at(i, j) = map == PairMap::one_minus_dot ? square / 2 : square;
        });
  }
};

/// The same of a metric of coordinates: the score, before its root.
template <class T>
struct CoordinateKeys {
  Keys<T> keys;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    f.for_each([&](int64_t i, int64_t j, T score) { keys.at(i, j) = keys.inside(i, j) ? score : infinity<T>(); });
  }
};

/// The best [first, first + 32) of every row, from the columns of a block and, where `merge`, from what was kept of the
/// columns before it.
template <class T>
struct KeepBest {
  Weights<T> strip;
  int64_t n, k, first;
  bool merge;
  T* kept;
  int64_t* index;

  NEARFAR_DEVICE void operator()() const {
    const Block& b = strip.block;
    const int64_t local = cuda::global_warp(), i = b.row + local;
    if (local >= b.rows || i >= n) return;
    const int lane = cuda::lane_index();
    const int size = k - first < cuda::kWarp ? static_cast<int>(k - first) : cuda::kWarp;
    T best = infinity<T>();
    int64_t where = -1;
    if (merge && lane < size) best = kept[i * k + first + lane], where = index[i * k + first + lane];
    // What earlier rounds have taken: everything up to (bound, bound_at).
    const T bound = first > 0 ? kept[i * k + first - 1] : -infinity<T>();
    const int64_t bound_at = first > 0 ? index[i * k + first - 1] : -1;
    const bool done = first > 0 && bound_at < 0;
    T worst = cuda::shuffle(best, size - 1);
    for (int64_t j0 = 0; j0 < b.columns && !done; j0 += cuda::kWarp) {
      const int64_t j = b.column + j0 + lane;
      const T own = strip.w[local * strip.pitch + j0 + lane];
      const bool later = first == 0 || own > bound || (own == bound && j > bound_at);
      for (uint32_t bits = cuda::ballot(later && own < worst); bits; bits &= bits - 1) {
        const int from = cuda::lowest_bit(bits);
        const T candidate = cuda::shuffle(own, from);
        if (!(candidate < worst)) continue;  // the same for all lanes
        const int place = cuda::count_bits(cuda::ballot(lane < size && best <= candidate && where >= 0));
        const T before = cuda::shuffle_up(best, 1);
        const int64_t before_at = cuda::shuffle_up(where, 1);
        if (lane == place) {
          best = candidate;
          where = b.column + j0 + from;
        } else if (lane > place && lane < size) {
          best = before;
          where = before_at;
        }
        worst = cuda::shuffle(best, size - 1);
      }
    }
    if (lane < size) kept[i * k + first + lane] = best, index[i * k + first + lane] = where;
  }
};

/// Measured again from the rows as given, and sorted: a warp a row.
template <class T>
struct MeasureBest {
  Source<T> x, y;
  PairMap map;
  double p;  // of minkowski
  int64_t k;
  T* value;
  int64_t* index;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= x.rows.n) return;
    T* values = value + i * k;
    int64_t* indices = index + i * k;
    for (int64_t c = 0; c < k; ++c) {
      const int64_t j = indices[c];
      const T own = j < 0 ? not_a_number<T>() : measure(i, j);
      if (cuda::lane_index() == 0) values[c] = own;
    }
    cuda::sync_warp();  // all have read the indices
    if (cuda::lane_index() != 0) return;
    for (int64_t c = 1; c < k && indices[c] >= 0; ++c) {
      const T own = values[c];
      const int64_t j = indices[c];
      int64_t place = c;
      for (; place > 0 && (values[place - 1] > own || (values[place - 1] == own && indices[place - 1] > j)); --place)
        values[place] = values[place - 1], indices[place] = indices[place - 1];
      values[place] = own;
      indices[place] = j;
    }
    for (int64_t c = 0; c < k; ++c) {
      if (map == PairMap::euclidean) values[c] = sqrt(values[c]);
      if (map == PairMap::dot) values[c] = -values[c];
      if (map == PairMap::minkowski) values[c] = power(values[c], 1 / p);
    }
  }
  NEARFAR_DEVICE T measure(int64_t i, int64_t j) const {
    if (is_dot()) {
      const double dot = warp_dot(x, i, y, j);
      if (map == PairMap::dot) return static_cast<T>(-dot);
      if (!(1 - dot <= static_cast<double>(kNear<T>))) return static_cast<T>(1 - dot);
    }
    double sum = 0;
    NEARFAR_ROLLED
    for (int64_t c = cuda::lane_index(); c < x.rows.d; c += cuda::kWarp) {
      const double difference = static_cast<double>(x.get(i, c)) - static_cast<double>(y.get(j, c));
      if (map == PairMap::cityblock) {
        sum += fabs(difference);
      } else if (map == PairMap::chebyshev) {
        sum = largest(sum, fabs(difference));
      } else if (map == PairMap::minkowski) {
        sum += power(fabs(difference), p);
      } else {
        sum += difference * difference;
      }
    }
    if (map == PairMap::chebyshev) {
      for (int mask = cuda::kWarp / 2; mask > 0; mask /= 2) sum = largest(sum, cuda::shuffle_xor(sum, mask));
      return static_cast<T>(sum);
    }
    sum = cuda::warp_sum(sum);
    return static_cast<T>(is_dot() ? sum / 2 : sum);
  }
  NEARFAR_DEVICE bool is_dot() const { return map == PairMap::dot || map == PairMap::one_minus_dot; }
};

/// put_keys(pairs, a block of the strip): the one thing in which searches differ.
template <class E, class T, class PutKeys>
void search(cuda::Context& c, const SelectParams<T>& p, bool distance, PutKeys put_keys) {
  const Pairs<T, E> pairs(c, p.x, p.y, p.normalize, distance, false, false, !by_coordinate(p.map));
  // More than 32 are found round by round, from whole rows.
  Strip<T, E> strip(c, pairs, p.k > cuda::kWarp, true, nullptr, nullptr);
  T* kept = c.take<T>(p.x.n * p.k);
  strip.for_blocks([&](const Weights<T>& weights) {
    const Block& b = weights.block;
    put_keys(pairs, weights);
    for (int64_t first = 0; first < p.k; first += cuda::kWarp)
      c.launch_warps(b.rows, KeepBest<T>{weights, p.x.n, p.k, first, b.column > 0, kept, p.index});
  });
  c.launch_warps(p.x.n, MeasureBest<T>{pairs.scores.x, pairs.scores.y, p.map, p.power, p.k, p.value, p.index});
}

}  // namespace

namespace cuda {

template <class T>
void select(Context& c, const SelectParams<T>& p) {
  if (by_coordinate(p.map))
    return with_coordinate_map(p.map, p.power, [&](auto map) {
      search<T>(c, p, false, [&](const Pairs<T, T>& pairs, const Weights<T>& weights) {
        launch_coordinates(c, map.score, pairs, weights.block,
                           CoordinateKeys<T>{{p.exclude_self, p.x.n, p.y.n, weights}});
      });
    });
  const bool distance = is_distance(p.map);
  with_element<T>(p.x.dtype, distance, [&](auto element) {
    search<decltype(element)>(c, p, distance, [&](const auto& pairs, const Weights<T>& weights) {
      const Block& b = weights.block;
      launch_scores(c, plan_scores(c, "keys", pairs, b), pairs, b,
                    KeyEpilogue<T>{{p.exclude_self, p.x.n, p.y.n, weights}, pairs.scores, p.map});
    });
  });
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(select, SelectParams)
