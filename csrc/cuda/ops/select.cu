// Select: for every row the k best columns. k-means assignment (k = 1) and k nearest neighbours.
//
// Of one neighbour every tile leaves the best of each of its rows. Of more, keys go to a strip; a warp scans a row of
// it in ascending order and keeps the 32 best so far in its lanes; more than 32 are found 32 at a time. Ties go to the
// lower index. The kept candidates are then measured again from the original rows and sorted by (value, index).
#include "cuda/coordinate.hpp"
#include "cuda/ops.hpp"

namespace nearfar {
namespace {

/// What is minimised: the squared distance, 1 - <u, v> of unit rows, or the negative dot product.
template <class T>
struct ScoreKey {
  static constexpr bool kDistances = true;
  Scores<T> scores;
  PairMap map;

  /// In the place of a tile's products.
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t i0, int64_t j0, uint64_t hidden) const {
    scores.apply(f, i0, j0, hidden);
    if (map == PairMap::dot) f.for_each([](int64_t, int64_t, T& value) { value = -value; });
    if (map != PairMap::one_minus_dot) return;
    f.for_each([](int64_t, int64_t, T& value) { value = 1 - value; });
    const uint64_t near = f.find([&](int a, int b) { return f(a, b) <= scores.near_part; }) & ~hidden;
    f.for_bits(near, [&](int a, int b) { f.set(a, b, scores.measure(i0 + P::row(a), j0 + P::col(b)) / 2); });
  }
};

/// The same of a metric of coordinates: the score, before its root.
template <class T>
struct CoordinateKey {
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>&, int64_t, int64_t, uint64_t) const {}
};

/// Keys of a block of pairs, and which pairs have one.
template <class T, class Key>
struct Keys : Key {
  bool exclude_self;
  int64_t n, m;
  Block block;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  NEARFAR_DEVICE int64_t row(int64_t i) const { return block.row + i; }
  NEARFAR_DEVICE int64_t column(int64_t j) const { return block.column + j; }
  NEARFAR_DEVICE bool inside(int64_t i, int64_t j) const {
    return row(i) < n && column(j) < m && !(exclude_self && row(i) == column(j));
  }
  /// Keys in the place of a tile's products, +inf where there is none.
  template <class P>
  NEARFAR_DEVICE void put(const Fragment<P>& f) const {
    const int64_t i0 = row(f.i0), j0 = column(f.j0);
    const bool crossed = exclude_self && i0 < j0 + P::kN && j0 < i0 + P::kM;
    const uint64_t hidden =
        f.without(!crossed && i0 + P::kM <= n && j0 + P::kN <= m, [&](int64_t i, int64_t j) { return inside(i, j); });
    this->apply(f, i0, j0, hidden);
    f.replace(hidden, infinity<T>());
  }
};

/// All of them to a strip, +inf where a column is not to be chosen.
template <class T, class Key>
struct StoreKeys : Keys<T, Key> {
  Weights<T> strip;

  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    this->put(f);
    strip.store(f);
  }
};

/// The least key and its column, of equal ones the lower. Neither infinity nor NaN is chosen.
template <class T>
struct Least {
  T key;
  int column;

  NEARFAR_DEVICE static Least none() { return {infinity<T>(), -1}; }
  NEARFAR_DEVICE void take(T other, int other_column) {
    if (other < key || (other == key && other_column < column)) key = other, column = other_column;
  }
};

/// That of every row of a tile.
template <class T, class Key>
struct LeastOfTile : Keys<T, Key> {
  int64_t tiles_n;
  Least<T>* of_rows;  // [row][tile_n]; columns of the block

  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t tile_n, int64_t) const {
    this->put(f);
    Least<T> least[P::kRows];
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      least[a] = Least<T>::none();
      NEARFAR_UNROLL
      for (int b = 0; b < P::kCols; ++b)  // in ascending order: of equal ones the first
        if (f(a, b) < least[a].key) least[a] = {f(a, b), P::col(b)};
    }
    NEARFAR_SHARED Least<T> parts[P::kWarpsN][P::kM];
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      NEARFAR_UNROLL
      for (int mask = 1; mask < P::kRowLanes; mask *= 2)
        least[a].take(cuda::shuffle_xor(least[a].key, mask), cuda::shuffle_xor(least[a].column, mask));
      if (first_of_row<P>()) parts[P::warp_n()][P::row(a)] = least[a];
    }
    cuda::sync_block();
    for (int i = cuda::thread_index(); i < P::kM; i += cuda::kThreads) {
      Least<T> all = parts[0][i];
      for (int warp = 1; warp < P::kWarpsN; ++warp) all.take(parts[warp][i].key, parts[warp][i].column);
      if (all.column >= 0) all.column += static_cast<int>(f.j0);
      of_rows[(f.i0 + i) * tiles_n + tile_n] = all;
    }
    cuda::sync_block();
  }
};

/// The tiles of a row, and what was kept of the columns before them: a warp a row.
template <class T>
struct MergeLeast {
  const Least<T>* of_rows;
  int64_t tiles_n;
  Block block;
  int64_t n;
  T* kept;
  int64_t* index;

  NEARFAR_DEVICE void operator()() const {
    const int64_t local = cuda::global_warp(), i = block.row + local;
    if (local >= block.rows || i >= n) return;
    Least<T> least = Least<T>::none();
    for (int64_t tile = cuda::lane_index(); tile < tiles_n; tile += cuda::kWarp) {
      const Least<T> other = of_rows[local * tiles_n + tile];
      least.take(other.key, other.column);
    }
    for (int mask = 1; mask < cuda::kWarp; mask *= 2)
      least.take(cuda::shuffle_xor(least.key, mask), cuda::shuffle_xor(least.column, mask));
    if (cuda::lane_index() != 0 || (block.column > 0 && !(least.key < kept[i]))) return;
    kept[i] = least.key;
    index[i] = least.column < 0 ? -1 : block.column + least.column;
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
    const T* line = strip.w + local * strip.pitch + lane;
    constexpr int kAhead = kPadRows / cuda::kWarp;  // loads that are on their way together
    for (int64_t j0 = 0; j0 < b.columns && !done; j0 += kPadRows) {
      T ahead[kAhead];
      NEARFAR_UNROLL
      for (int u = 0; u < kAhead; ++u) ahead[u] = line[j0 + u * cuda::kWarp];
      NEARFAR_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const T own = ahead[u];
        const int64_t j = b.column + j0 + u * cuda::kWarp + lane;
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
            where = j - lane + from;
          } else if (lane > place && lane < size) {
            best = before;
            where = before_at;
          }
          worst = cuda::shuffle(best, size - 1);
        }
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
  static constexpr int kResident = 5;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= x.rows.n) return;
    T* values = value + i * k;
    int64_t* indices = index + i * k;
    // Powers take longer than the memory, and too much code for more than one number at once.
    choose_way<T>(map != PairMap::minkowski && x.wide_as(y), x.rows.dtype, [&](auto how) {
      for (int64_t c = 0; c < k; ++c) {
        const int64_t j = indices[c];
        const T own = j < 0 ? not_a_number<T>() : measure(how, i, j);
        if (cuda::lane_index() == 0) values[c] = own;
      }
    });
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
  template <class Way>
  NEARFAR_DEVICE T measure(Way how, int64_t i, int64_t j) const {
    if (is_dot()) {
      const double dot = warp_dot(how, x, i, y, j);
      if (map == PairMap::dot) return static_cast<T>(-dot);
      if (!(1 - dot <= static_cast<double>(kNear<T>))) return static_cast<T>(1 - dot);
    }
    double sum = 0;
    for_both(how, x, i, y, j, [&](T u, T v) {
      const double difference = fabs(static_cast<double>(u) - static_cast<double>(v));
      if (map == PairMap::cityblock) {
        sum += difference;
      } else if (map == PairMap::chebyshev) {
        sum = largest(sum, difference);
      } else if (Way::kWide == 1 && map == PairMap::minkowski) {
        sum += power(difference, p);
      } else {
        sum += difference * difference;
      }
    });
    if (map == PairMap::chebyshev) {
      for (int mask = cuda::kWarp / 2; mask > 0; mask /= 2) sum = largest(sum, cuda::shuffle_xor(sum, mask));
      return static_cast<T>(sum);
    }
    sum = cuda::warp_sum(sum);
    return static_cast<T>(is_dot() ? sum / 2 : sum);
  }
  NEARFAR_DEVICE bool is_dot() const { return map == PairMap::dot || map == PairMap::one_minus_dot; }
};

/// By scores of packed rows E.
template <class T, class E>
struct SearchScores {
  static constexpr bool kScored = true;
  PairMap map;
  using Packed = E;
  using Points = Pairs<T, E>;
  ScoreKey<T> key(const Points& pairs) const { return {pairs.scores, map}; }
  Plan plan(const cuda::Context& c, const Points& pairs, const Block& b) const {
    return plan_scores(c, "keys", pairs, b);
  }
  template <class Epilogue>
  void launch(cuda::Context& c, const Plan& plan, const Points& pairs, const Block& b, const Epilogue& epilogue) const {
    launch_scores(c, plan, pairs, b, epilogue);
  }
};

/// By a metric of coordinates.
template <class T, class Score>
struct SearchCoordinates {
  static constexpr bool kScored = false;
  Score score;
  using Packed = T;
  using Points = Pairs<T, T>;
  CoordinateKey<T> key(const Points&) const { return {}; }
  Plan plan(const cuda::Context&, const Points&, const Block&) const { return {"keys", "simt", 64, 1}; }
  template <class Epilogue>
  void launch(cuda::Context& c, const Plan&, const Points& pairs, const Block& b, const Epilogue& epilogue) const {
    launch_coordinates(c, score, pairs, b, epilogue);
  }
};

template <class T, class By>
void search(cuda::Context& c, const SelectParams<T>& p, const By& by) {
  const typename By::Points pairs(c, p.x, p.y, p.normalize, By::kScored && is_distance(p.map), false, false,
                                  By::kScored);
  const auto key = by.key(pairs);
  using Key = std::remove_const_t<decltype(key)>;
  const auto keys_of = [&](const Block& b) { return Keys<T, Key>{key, p.exclude_self, p.x.n, p.y.n, b}; };
  T* kept = c.take<T>(p.x.n * p.k);
  if (p.k == 1) {
    constexpr int64_t kNumbers = sizeof(Least<T>) / sizeof(T);
    const StripShape shape = tile_blocks(c, pairs, kNumbers);
    Least<T>* of_rows = c.take<Least<T>>(shape.rows * tiles_of(shape));
    for_tile_blocks(c, pairs, kNumbers, [&](const Block& b) {
      const Plan plan = by.plan(c, pairs, b);
      const int64_t tiles_n = ceil_div(b.columns, plan.tile);
      by.launch(c, plan, pairs, b, LeastOfTile<T, Key>{keys_of(b), tiles_n, of_rows});
      c.launch_warps(b.rows, MergeLeast<T>{of_rows, tiles_n, b, p.x.n, kept, p.index});
    });
  } else {
    // More than 32 are found round by round, from whole rows.
    Strip<T, typename By::Packed> strip(c, pairs, p.k > cuda::kWarp, true, nullptr, nullptr);
    strip.for_blocks([&](const Weights<T>& weights) {
      const Block& b = weights.block;
      by.launch(c, by.plan(c, pairs, b), pairs, b, StoreKeys<T, Key>{keys_of(b), weights});
      for (int64_t first = 0; first < p.k; first += cuda::kWarp)
        c.launch_warps(b.rows, KeepBest<T>{weights, p.x.n, p.k, first, b.column > 0, kept, p.index});
    });
  }
  c.launch_warps(p.x.n, MeasureBest<T>{pairs.scores.x, pairs.scores.y, p.map, p.power, p.k, p.value, p.index});
}

}  // namespace

namespace cuda {

template <class T>
void select(Context& c, const SelectParams<T>& p) {
  if (by_coordinate(p.map))
    return with_coordinate_map(p.map, p.power,
                               [&](auto map) { search(c, p, SearchCoordinates<T, decltype(map.score)>{map.score}); });
  with_element<T>(p.x.dtype, is_distance(p.map),
                  [&](auto element) { search(c, p, SearchScores<T, decltype(element)>{p.map}); });
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(select, SelectParams)
