// Select: for every row the k best columns. k-means assignment (k = 1) and k nearest neighbours.
//
// One neighbour is found as nearest.hpp says, and few among many 16-bit rows. Of others, keys go to a strip; a warp
// scans a row of it in ascending order and keeps the 32 best so far in its lanes; more than 32 are found 32 at a time.
// Ties go to the lower index. The kept candidates are then measured again from the original rows and sorted by (value,
// index).
#include "cuda/nearest.hpp"
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

/// Keys to a strip, +inf where a column is not to be chosen.
template <class T, class Key>
struct StoreKeys : Key {
  Candidates candidates;
  Weights<T> strip;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    const uint64_t hidden = candidates.hidden(f);
    Key::apply(f, candidates.row(f.i0), candidates.column(f.j0), hidden);
    f.replace(hidden, infinity<T>());
    strip.store(f);
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
    BestOfWarp<T> best{size};
    if (merge) best.load(kept + i * k + first, index + i * k + first);
    // What earlier rounds have taken: everything up to (bound, bound_at).
    const T bound = first > 0 ? kept[i * k + first - 1] : -infinity<T>();
    const int64_t bound_at = first > 0 ? index[i * k + first - 1] : -1;
    const bool done = first > 0 && bound_at < 0;
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
        for (uint32_t bits = cuda::ballot(later && own < best.worst); bits; bits &= bits - 1) {
          const int from = cuda::lowest_bit(bits);
          const T candidate = cuda::shuffle(own, from);
          if (candidate < best.worst) best.offer(candidate, j - lane + from);  // the same for all lanes
        }
      }
    }
    if (lane < size) kept[i * k + first + lane] = best.value, index[i * k + first + lane] = best.index;
  }
};

/// Measured again from the rows as given, and sorted: a warp a row.
template <class T>
struct MeasureBest {
  Measure<T> measure;
  int64_t n, k;
  T* value;
  int64_t* index;
  static constexpr int kResident = 5;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= n) return;
    T* values = value + i * k;
    int64_t* indices = index + i * k;
    measure.with_row(i, [&](auto measured) {
      for (int64_t c = 0; c < k; ++c) {
        const int64_t j = indices[c];
        const T own = j < 0 ? not_a_number<T>() : measured(j);
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
    for (int64_t c = 0; c < k; ++c) values[c] = measure.finish(values[c]);
  }
};

/// By scores of packed rows E.
template <class T, class E>
struct SearchScores {
  static constexpr bool kScored = true;
  PairMap map;
  using Packed = E;
  using Points = Pairs<T, E>;
  ScoreKey<T> key(const Points& pairs) const { return {pairs.scores, map}; }
  Rank<T> rank(cuda::Context& c, const Points& pairs) const { return rank_of(c, pairs, map == PairMap::one_minus_dot); }
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
  CoordinateRank<T> rank(cuda::Context&, const Points&) const { return {}; }
  Plan plan(const cuda::Context&, const Points&, const Block&) const { return {"keys", "simt", 64, 1}; }
  template <class Epilogue>
  void launch(cuda::Context& c, const Plan&, const Points& pairs, const Block& b, const Epilogue& epilogue) const {
    launch_coordinates(c, score, pairs, b, epilogue);
  }
};

/// Are there so many columns that measuring four for every neighbour takes less than a strip of all their keys?
template <class T>
bool by_groups(const SelectParams<T>& p) {
  return p.k <= cuda::kWarp && p.y.n >= 128 * p.k;
}

template <class T, class By, class Of>
void search_groups(cuda::Context& c, const SelectParams<T>& p, const By& by, const typename By::Points& pairs,
                   const Measure<T>& measure, Of candidates_of) {
  const Rank<T> ranks = by.rank(c, pairs);
  constexpr int64_t kNumbers = 64 / Groups::kSize;
  const StripShape shape = tile_blocks(c, pairs, kNumbers);
  T* of_rows = c.take<T>(shape.rows * shape.columns / Groups::kSize);
  for_tile_blocks(c, pairs, kNumbers, [&](const Block& b) {
    const Plan plan = by.plan(c, pairs, b);
    const Candidates candidates = candidates_of(b);
    const int64_t groups = b.columns / Groups::kSize;
    by.launch(c, plan, pairs, b, LeastOfGroups<T, Rank<T>>{candidates, ranks, groups, of_rows});
    c.launch_warps(b.rows, SettleBest<T, Rank<T>>{
                               candidates, ranks, of_rows, groups, {plan.tile}, measure, p.k, p.value, p.index});
  });
}

template <class T, class By>
void search(cuda::Context& c, const SelectParams<T>& p, const By& by) {
  constexpr bool kGroups = sizeof(typename By::Packed) == 2;
  const bool one = p.k == 1, ranked = one || (kGroups && by_groups(p));
  const typename By::Points pairs(c, p.x, p.y, p.normalize, By::kScored && is_distance(p.map), false, ranked,
                                  !By::kScored ? PairUse::rows
                                  : ranked     ? PairUse::ranks
                                               : PairUse::scores);
  const Measure<T> measure{pairs.scores.x, pairs.scores.y, p.map, p.power};
  const auto candidates = [&](const Block& b) { return Candidates{p.exclude_self, p.x.n, p.y.n, b}; };
  if (one) {
    const auto ranks = by.rank(c, pairs);
    using Ranks = std::remove_const_t<decltype(ranks)>;
    constexpr int64_t kNumbers = sizeof(Least<T>) / sizeof(T);
    const StripShape shape = tile_blocks(c, pairs, kNumbers);
    Least<T>* of_rows = c.take<Least<T>>(shape.rows * tiles_of(shape));
    for_tile_blocks(c, pairs, kNumbers, [&](const Block& b) {
      const Plan plan = by.plan(c, pairs, b);
      const int64_t tiles_n = ceil_div(b.columns, plan.tile);
      by.launch(c, plan, pairs, b, LeastOfTile<T, Ranks>{candidates(b), ranks, tiles_n, of_rows});
      c.launch_warps(b.rows,
                     Settle<T, Ranks>{candidates(b), ranks, of_rows, tiles_n, plan.tile, measure, p.value, p.index});
    });
    return;
  }
  if constexpr (kGroups)
    if (ranked) return search_groups(c, p, by, pairs, measure, candidates);
  const auto key = by.key(pairs);
  using Key = std::remove_const_t<decltype(key)>;
  // More than 32 are found round by round, from whole rows.
  Strip<T, typename By::Packed> strip(c, pairs, p.k > cuda::kWarp, true, nullptr, nullptr);
  T* kept = c.take<T>(p.x.n * p.k);
  strip.for_blocks([&](const Weights<T>& weights) {
    const Block& b = weights.block;
    by.launch(c, by.plan(c, pairs, b), pairs, b, StoreKeys<T, Key>{key, candidates(b), weights});
    for (int64_t first = 0; first < p.k; first += cuda::kWarp)
      c.launch_warps(b.rows, KeepBest<T>{weights, p.x.n, p.k, first, b.column > 0, kept, p.index});
  });
  c.launch_warps(p.x.n, MeasureBest<T>{measure, p.x.n, p.k, p.value, p.index});
}

}  // namespace

namespace cuda {

template <class T>
void select(Context& c, const SelectParams<T>& p) {
  if (by_coordinate(p.map))
    return with_coordinate_map(p.map, p.power,
                               [&](auto map) { search(c, p, SearchCoordinates<T, decltype(map.score)>{map.score}); });
  // The bound on ranks says what a missing centre costs.
  const bool ranked = p.k == 1 || by_groups(p);
  const bool centered = is_distance(p.map) && (!ranked || p.x.d <= kDirectDims || p.x.dtype != p.y.dtype);
  with_element<T>(p.x.dtype, centered, [&](auto element) { search(c, p, SearchScores<T, decltype(element)>{p.map}); });
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(select, SelectParams)
