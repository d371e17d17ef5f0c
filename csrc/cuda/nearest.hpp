// The nearest columns of every row, one or at most 32: those of all columns, exact although tensor cores order them.
//
// Columns are ordered by ranks, |y|^2 - 2 <x, y> or -<x, y>, which the engine's sums move by no more than a bound that
// is known beforehand. Every tile leaves the least rank of each of its rows and its column, or that several columns are
// too close to tell. A warp a row then measures, from the rows as given, whatever could be the best: nearly always one
// column. So the answer is that of the measured values, ties go to the lower index, and the epilogue of a tile asks
// nothing of a single pair. See cpu/nearest.hpp.
//
// Of more neighbours, which one tile may hold, every four columns leave their least rank. The k least of these are of k
// columns at least, so that no column further above the k-th than the bound is among the k nearest: all others are
// measured.
#pragma once

#include <limits>

#include "cuda/coordinate.hpp"

namespace nearfar {
inline namespace device {

/// Which pairs of a block have a key.
struct Candidates {
  bool exclude_self;
  int64_t n, m;
  Block block;

  NEARFAR_DEVICE int64_t row(int64_t i) const { return block.row + i; }
  NEARFAR_DEVICE int64_t column(int64_t j) const { return block.column + j; }
  NEARFAR_DEVICE bool has(int64_t i, int64_t j) const {
    return row(i) < n && column(j) < m && !(exclude_self && row(i) == column(j));
  }
  /// Bits of the pairs of a tile that have none.
  template <class P>
  NEARFAR_DEVICE uint64_t hidden(const Fragment<P>& f) const {
    const int64_t i0 = row(f.i0), j0 = column(f.j0);
    const bool crossed = exclude_self && i0 < j0 + P::kN && j0 < i0 + P::kM;
    return f.without(!crossed && i0 + P::kM <= n && j0 + P::kN <= m, [&](int64_t i, int64_t j) { return has(i, j); });
  }
};

/// What orders the columns of a row, from products of packed rows, and how far it may be from what it stands for.
template <class T>
struct Rank {
  static constexpr bool kDistances = true;
  Scores<T> scores;
  T rounding;                    // of a sum of products, over the norms of both rows
  T floor;                       // what numbers too small for T may add up to
  const double* largest_square;  // of norms of columns; null: 1 at most
  const T *x_lost, *y_lost;      // by packing, of norms: of each row, and at most of a column; null: nothing

  /// In the place of a tile's products.
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t i0, int64_t j0) const {
    if (scores.x_factor)
      f.for_each(scores.x_factor + i0, scores.y_factor + j0, [](T& value, T x, T y) { value *= x * y; });
    if (!scores.distance) return f.for_each([](int64_t, int64_t, T& value) { value = -value; });
    if (scores.direct) return;
    f.for_each(scores.x_squares + i0, scores.y_squares + j0,
               [](T& value, T, T square) { value = fma(T(-2), value, square); });
  }
  /// Columns of row i whose rank is higher than `least` by more than this are not nearer than one that has this rank or
  /// less. A column as near as that one has a norm of |x| and its distance at most.
  NEARFAR_DEVICE T slack(int64_t i, T least) const {
    const T square = scores.x_squares[i], norm = sqrt(square);
    T error, lost = 0;
    if (scores.direct) {
      error = least;
    } else if (scores.distance) {
      const T other = norm + sqrt(largest(square + least, T(0)));
      error = other * (2 * norm + other);
      if (x_lost) lost = x_lost[i] * other + (norm + x_lost[i]) * *y_lost;
    } else {
      if (norm == 0) return 0;
      error = norm * (largest_square ? sqrt(static_cast<T>(*largest_square)) : T(1));
    }
    return 2 * rounding * error + T(4.001) * lost + floor;
  }
};

/// The same of a metric of coordinates: the score, before its root.
template <class T>
struct CoordinateRank {
  static constexpr bool kDistances = false;
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>&, int64_t, int64_t) const {}
  NEARFAR_DEVICE T slack(int64_t, T) const { return 0; }
};

/// `rounding` of sums over the depth, at most: what the engine may lose in every addition, relative to the norms of
/// both rows (none of its partial sums is larger). Tensor cores cut off where others round, each of the products that
/// they add at once.
template <class T, class E>
Rank<T> rank_of(cuda::Context& c, const Pairs<T, E>& pairs, bool unit) {
  const double d = static_cast<double>(pairs.x.d), ulp = std::numeric_limits<T>::epsilon();
  double rounding = (d + 8) * ulp / 2;  // plain sums
  if (sizeof(E) == 2) rounding = (1.1 * d + 8) * ulp;
  if (sizeof(E) == 4 && !c.exact) rounding = (1.1 * d + 8) * ulp + 1.0 / 1024;  // both operands rounded to tf32
  if (pairs.split()) rounding = (d / 32 + 128) * ulp;  // sums start anew every 32 columns; low times low is left out
  // Norms and distances in the bound come from such sums too.
  const double wider = 1 + 2 * std::sqrt(rounding);
  double* largest = nullptr;
  if (!pairs.scores.distance && !unit) {
    largest = c.take<double>(1);
    c.launch(1, LargestOf<T>{pairs.y.squares, pairs.y.n, largest, false});
  }
  Scores<T> scores = pairs.scores;
  if (!scores.x.inverse && !scores.y.inverse) scores.x_factor = nullptr;  // they are 1
  return {scores,
          static_cast<T>(rounding * wider * wider),
          static_cast<T>(4 * d) * std::numeric_limits<T>::min(),
          largest,
          pairs.x.lost,
          pairs.y.lost ? pairs.y.lost + pairs.y.padded : nullptr};
}

/// The least rank of a row of a tile, and its column, which counts from the tile's first.
template <class T>
struct Least {
  // Neither infinity nor NaN is chosen; several columns, of which this is the first, are too close to tell.
  static constexpr int kNone = INT32_MAX, kSeveral = 1 << 16;
  T rank;
  int column;

  /// Columns of parts of a row that reach the same bar.
  NEARFAR_DEVICE static int merge(int a, int b) {
    if (a == kNone || b == kNone) return a == kNone ? b : a;
    const int first = a % kSeveral, other = b % kSeveral;
    return (first < other ? first : other) | kSeveral;
  }
};

/// Every thread gets what `merge` makes of the values of all threads that share a row.
template <class P, class V, class Merge>
NEARFAR_DEVICE void reduce_rows(V (&v)[P::kRows], Merge merge) {
  NEARFAR_UNROLL
  for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
  for (int mask = 1; mask < P::kRowLanes; mask *= 2) v[a] = merge(v[a], cuda::shuffle_xor(v[a], mask));
  if constexpr (P::kWarpsN > 1) {
    NEARFAR_SHARED V parts[P::kWarpsN][P::kM];
    cuda::sync_block();
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a)
      if (first_of_row<P>()) parts[P::warp_n()][P::row(a)] = v[a];
    cuda::sync_block();
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      v[a] = parts[0][P::row(a)];
      for (int warp = 1; warp < P::kWarpsN; ++warp) v[a] = merge(v[a], parts[warp][P::row(a)]);
    }
  }
}

template <class T, class Ranks>
struct LeastOfTile {
  static constexpr bool kDistances = Ranks::kDistances, kBlocked = true, kOverlaps = true;
  Candidates candidates;
  Ranks ranks;
  int64_t tiles_n;
  Least<T>* of_rows;  // [row][tile_n]

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t tile_n, int64_t) const {
    static_assert(P::kCols <= 32, "a word of bits for the columns of a thread");
    const int64_t i0 = candidates.row(f.i0);
    ranks.apply(f, i0, candidates.column(f.j0));
    f.replace(candidates.hidden(f), infinity<T>());
    T least[P::kRows];
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      least[a] = infinity<T>();
      NEARFAR_UNROLL
      for (int b = 0; b < P::kCols; ++b) least[a] = smallest(least[a], f(a, b));
    }
    reduce_rows<P>(least, [](T a, T b) { return smallest(a, b); });
    int column[P::kRows];
    bool tied[P::kRows];  // equal ranks are equal columns: the first will do
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      const T slack = ranks.slack(i0 + P::row(a), least[a]);
      const T bar = slack < infinity<T>() ? least[a] + slack : least[a];
      tied[a] = !(slack > 0);
      const uint32_t bits = reach(f, a, bar);
      column[a] = Least<T>::kNone;
      if (bits != 0 && least[a] < infinity<T>())
        column[a] = P::col(cuda::lowest_bit(bits)) | (bits & (bits - 1) ? Least<T>::kSeveral : 0);
    }
    reduce_rows<P>(column, [](int a, int b) { return Least<T>::merge(a, b); });
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a)
      if (first_of_row<P>() && P::warp_n() == 0)
        of_rows[(f.i0 + P::row(a)) * tiles_n + tile_n] = {
            least[a], tied[a] && column[a] != Least<T>::kNone ? column[a] % Least<T>::kSeveral : column[a]};
  }

 private:
  /// Bits of the columns of row a with a rank of `bar` or less: 16 are added up as a number, because multiply-adds have
  /// twice the rate of selects.
  template <class P>
  NEARFAR_DEVICE static uint32_t reach(const Fragment<P>& f, int a, T bar) {
    constexpr int kHalf = P::kCols < 16 ? P::kCols : 16;
    uint32_t bits = 0;
    NEARFAR_UNROLL
    for (int half = 0; half < P::kCols; half += kHalf) {
      T sum = 0;
      NEARFAR_UNROLL
      for (int b = 0; b < kHalf; ++b) sum = fma(cuda::at_most(f(a, half + b), bar), T(1 << b), sum);
      bits |= static_cast<uint32_t>(sum) << half;
    }
    return bits;
  }
};

/// A pair, from the rows as given: by a warp, before its root or sign.
template <class T>
struct Measure {
  Source<T> x, y;
  PairMap map;
  double p;  // of minkowski

  /// f(measure(j) of row i, by all lanes).
  template <class F>
  NEARFAR_DEVICE void with_row(int64_t i, F f) const {
    // Powers take longer than the memory, and too much code for more than one number at once.
    choose_way<T>(map != PairMap::minkowski && x.wide_as(y), x.rows.dtype,
                  [&](auto how) { f([&](int64_t j) { return pair(how, i, j); }); });
  }
  NEARFAR_DEVICE T finish(T value) const {
    if (map == PairMap::euclidean) return sqrt(value);
    if (map == PairMap::dot) return -value;
    return map == PairMap::minkowski ? power(value, 1 / p) : value;
  }

 private:
  template <class Way>
  NEARFAR_DEVICE T pair(Way how, int64_t i, int64_t j) const {
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

/// Measures what could be the best of a block, and keeps it if it is better than what was kept of the columns before:
/// a warp a row.
template <class T, class Ranks>
struct Settle {
  Candidates candidates;
  Ranks ranks;
  const Least<T>* of_rows;
  int64_t tiles_n;
  int tile;  // columns
  Measure<T> measure;
  T* value;
  int64_t* index;
  static constexpr int kResident = 4;

  NEARFAR_DEVICE void operator()() const {
    const Block& b = candidates.block;
    const int64_t local = cuda::global_warp(), i = candidates.row(local);
    if (local >= b.rows || i >= candidates.n) return;
    const Least<T>* own = of_rows + local * tiles_n;
    const int lane = cuda::lane_index();
    T least = infinity<T>();
    for (int64_t t = lane; t < tiles_n; t += cuda::kWarp) least = smallest(least, own[t].rank);
    for (int mask = 1; mask < cuda::kWarp; mask *= 2) least = smallest(least, cuda::shuffle_xor(least, mask));
    const T slack = ranks.slack(i, least), bar = slack < infinity<T>() ? least + slack : least;
    T best = infinity<T>();
    int64_t where = -1;
    if (b.column > 0) best = value[i], where = index[i];
    measure.with_row(i, [&](auto measured) {
      const auto take = [&](int64_t j) {
        const T other = measured(j);
        if (where < 0 ? other < infinity<T>() : other < best || (other == best && j < where)) best = other, where = j;
      };
      for (int64_t t0 = 0; t0 < tiles_n; t0 += cuda::kWarp) {
        const int64_t t = t0 + lane;
        const Least<T> mine = t < tiles_n ? own[t] : Least<T>{infinity<T>(), Least<T>::kNone};
        for (uint32_t bits = cuda::ballot(mine.column != Least<T>::kNone && mine.rank <= bar); bits; bits &= bits - 1) {
          const int from = cuda::lowest_bit(bits), column = cuda::shuffle(mine.column, from);
          const int64_t first = (t0 + from) * tile;
          if (!(column & Least<T>::kSeveral)) {
            take(candidates.column(first + column));
            continue;
          }
          for (int64_t j = first + column % Least<T>::kSeveral; j < first + tile; ++j)
            if (candidates.has(local, j)) take(candidates.column(j));
        }
      }
    });
    if (lane != 0) return;
    const bool last = b.column + b.columns >= candidates.m;
    value[i] = where < 0 ? not_a_number<T>() : last ? measure.finish(best) : best;
    index[i] = where;
  }
};

// ---- several neighbours --------------------------------------------------------------------------------------------

/// The best of what a warp is offered, in ascending order, ties by lower index: one of `size` a lane.
template <class T>
struct BestOfWarp {
  int size;
  T value = infinity<T>();
  int64_t index = -1;  // none
  T worst = infinity<T>();

  /// What was kept before, by lanes below `size`.
  NEARFAR_DEVICE void load(const T* values, const int64_t* indices) {
    const int lane = cuda::lane_index();
    if (lane < size) value = values[lane], index = indices[lane];
    worst = cuda::shuffle(value, size - 1);
  }
  /// By all lanes, the same.
  NEARFAR_DEVICE void offer(T other, int64_t at) {
    const int lane = cuda::lane_index();
    const bool before = index >= 0 && (value < other || (value == other && index < at));
    const int place = cuda::count_bits(cuda::ballot(lane < size && before));
    const T above = cuda::shuffle_up(value, 1);
    const int64_t above_at = cuda::shuffle_up(index, 1);
    if (lane >= place && lane < size) {
      value = lane == place ? other : above;
      index = lane == place ? at : above_at;
    }
    worst = cuda::shuffle(value, size - 1);
  }
};

/// Columns by fours: of every 16 of a tile the four that a thread of the tensor cores holds, two pairs of neighbours.
/// Groups of a thread lie side by side.
struct Groups {
  static constexpr int kSize = 4, kChunk = 4 * kSize;
  int tile;  // columns

  /// Column c of group g, counted from those of the first tile.
  NEARFAR_DEVICE int64_t column(int64_t g, int c) const {
    const int64_t first = g * kSize / tile * tile;
    const int within = static_cast<int>(g - first / kSize), each = tile / kChunk;
    return first + within % each * kChunk + within / each * 2 + c / 2 * 8 + c % 2;
  }
  /// The first group of a thread in a tile.
  template <class P>
  NEARFAR_DEVICE static int own() {
    return P::col(0) % 8 / 2 * (P::kN / kChunk) + P::col(0) / kChunk;
  }
};

/// Of every group of a row its least rank.
template <class T, class Ranks>
struct LeastOfGroups {
  static constexpr bool kDistances = Ranks::kDistances, kBlocked = true;
  Candidates candidates;
  Ranks ranks;
  int64_t groups;
  T* of_rows;  // [row][group]

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    constexpr int kOwn = P::kCols / Groups::kSize, kWide = kOwn < 4 ? kOwn : 4;
    ranks.apply(f, candidates.row(f.i0), candidates.column(f.j0));
    f.replace(candidates.hidden(f), infinity<T>());
    T* const to = of_rows + f.j0 / Groups::kSize + Groups::own<P>();
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      NEARFAR_UNROLL
      for (int g = 0; g < kOwn; g += kWide) {
        T own[kWide];
        NEARFAR_UNROLL
        for (int q = 0; q < kWide; ++q) {
          const int b = (g + q) * Groups::kSize;
          own[q] = smallest(smallest(f(a, b), f(a, b + 1)), smallest(f(a, b + 2), f(a, b + 3)));
        }
        cuda::store_together(to + f.i(a) * groups + g, own);
      }
    }
  }
};

/// Measures what could be of the k best of a block, and keeps what is better than what was kept of the columns before:
/// a warp a row.
template <class T, class Ranks>
struct SettleBest {
  Candidates candidates;
  Ranks ranks;
  const T* of_rows;
  int64_t groups;
  Groups columns;
  Measure<T> measure;
  int64_t k;
  T* value;
  int64_t* index;
  static constexpr int kResident = 3;

  NEARFAR_DEVICE void operator()() const {
    const Block& b = candidates.block;
    const int64_t local = cuda::global_warp(), i = candidates.row(local);
    if (local >= b.rows || i >= candidates.n) return;
    const T* own = of_rows + local * groups;
    const int lane = cuda::lane_index(), count = static_cast<int>(k);
    const BestOfWarp<T> least = least_groups(own);
    const T reached = cuda::shuffle(least.value, count - 1), slack = ranks.slack(i, reached);
    const T bar = slack < infinity<T>() ? reached + slack : reached;
    BestOfWarp<T> best{count};
    if (b.column > 0) best.load(value + i * k, index + i * k);
    measure.with_row(i, [&](auto measured) {
      const auto take = [&](bool is, int64_t group) {
        for (uint32_t bits = cuda::ballot(is); bits; bits &= bits - 1) {
          const int64_t g = cuda::shuffle(group, cuda::lowest_bit(bits));
          NEARFAR_ROLLED
          for (int c = 0; c < Groups::kSize; ++c) {
            const int64_t j = columns.column(g, c);
            if (!candidates.has(local, j)) continue;
            const T other = measured(candidates.column(j));
            if (other < infinity<T>()) best.offer(other, candidates.column(j));
          }
        }
      };
      // More groups than lanes may be within the bound: then all are looked at once more, 128 columns in a round, until
      // k are found that none further on can beat.
      const bool kept = least.worst > bar || least.worst == infinity<T>();
      const bool tied = !(slack > 0) && cuda::shuffle(least.value, 0) == reached;
      const auto beaten = [&] {
        return best.worst < infinity<T>() && (tied || (measure.map != PairMap::dot && best.worst == 0));
      };
      NEARFAR_ROLLED
      for (int64_t g = lane; g - lane < (kept ? cuda::kWarp : groups) && !beaten(); g += cuda::kWarp) {
        const bool here = kept ? least.index >= 0 : g < groups;
        const T rank = kept ? least.value : here ? own[g] : infinity<T>();
        take(here && rank <= bar && rank < infinity<T>(), kept ? least.index : g);
      }
    });
    if (lane >= count) return;
    const bool last = b.column + b.columns >= candidates.m;
    value[i * k + lane] = !last ? best.value : best.index < 0 ? not_a_number<T>() : measure.finish(best.value);
    index[i * k + lane] = best.index;
  }

 private:
  NEARFAR_DEVICE BestOfWarp<T> least_groups(const T* own) const {
    BestOfWarp<T> least{cuda::kWarp};
    constexpr int kAhead = 8;  // loads that are on their way together
    for (int64_t g0 = 0; g0 < groups; g0 += kAhead * cuda::kWarp) {
      T ahead[kAhead];
      NEARFAR_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const int64_t g = g0 + u * cuda::kWarp + cuda::lane_index();
        ahead[u] = g < groups ? own[g] : infinity<T>();
      }
      NEARFAR_UNROLL
      for (int u = 0; u < kAhead; ++u)
        for (uint32_t bits = cuda::ballot(ahead[u] < least.worst); bits; bits &= bits - 1) {
          const int from = cuda::lowest_bit(bits);
          const T rank = cuda::shuffle(ahead[u], from);
          if (rank < least.worst) least.offer(rank, g0 + u * cuda::kWarp + from);  // the same for all lanes
        }
    }
    return least;
  }
};

}  // namespace device
}  // namespace nearfar
