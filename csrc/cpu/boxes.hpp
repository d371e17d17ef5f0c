// Near columns first: which columns can be among the nearest of a panel of rows, by the boxes around runs of them.
//
// In few dimensions most columns are further away than the k-th nearest, and a box around near columns says so for all
// of them at once. Rows of both sets are packed in an order in which near ones are together (`Arrangement`); chunks and
// tiles of columns have boxes (`Boxes`), and a panel meets the chunks whose boxes are nearest first, tile by tile while
// a row has a bar that the nearest point of the box reaches. What is scored is scored by the engine, with the bits that
// it would have in any order, and what is skipped is further away than k others: answers are those of the whole scan.
#pragma once

#include <algorithm>

#include "cpu/lists.hpp"
#include "cpu/operands.hpp"

namespace nearfar {
namespace {

/// Boxes around the chunks and tiles of columns, packed in an order of theirs.
template <class T>
class Boxes {
  using P = Policy<T>;
  static constexpr int NR = P::NR, L = kLanes<T>;
  static constexpr int64_t kMostDims = Operands<T>::kDirectDims;
  static constexpr T kInfinite = std::numeric_limits<T>::infinity();

  struct Reach {
    T bound;
    int32_t chunk;
    bool operator<(const Reach& other) const {
      return bound < other.bound || (bound == other.bound && chunk < other.chunk);
    }
  };

 public:
  Boxes(const Operands<T>& operands, int threads)
      : o_(operands),
        chunks_(ceil_div(o_.chunks.count, L) * L),
        boxes_((o_.chunks.tiles + o_.chunks.count) * 2 * o_.d),
        least_(o_.chunks.tiles + o_.chunks.count),
        sides_(chunks_ * 2 * o_.d) {
    for (int64_t at = 0; at < chunks_ * 2 * o_.d; ++at) sides_[at] = kInfinite;
    parallel_for(o_.chunks.count, threads, [&](int64_t chunk, int) {
      const int64_t all = o_.chunks.tiles + chunk;
      for (int64_t k = 0; k < o_.d; ++k) box(all)[2 * k] = kInfinite, box(all)[2 * k + 1] = -kInfinite;
      least_[all] = std::numeric_limits<int32_t>::max();
      for (int64_t t = o_.chunks.tile_begin(chunk); t < o_.chunks.tile_end(chunk); ++t) {
        const int64_t begin = t * P::MR, end = begin + P::MR < o_.chunks.columns ? begin + P::MR : o_.chunks.columns;
        least_[t] = std::numeric_limits<int32_t>::max();
        for (int64_t j = begin; j < end; ++j) {
          const int32_t index = static_cast<int32_t>(o_.y.row_at(j));
          least_[t] = index < least_[t] ? index : least_[t];
        }
        least_[all] = least_[t] < least_[all] ? least_[t] : least_[all];
        for (int64_t k = 0; k < o_.d; ++k) {
          T low = kInfinite, high = -kInfinite;  // a NaN is in no box, and nobody's neighbour
          for (int64_t j = 0; j < end - begin; ++j) {
            const T own = o_.tile(t)[k * P::MR + j];
            low = own < low ? own : low;
            high = own > high ? own : high;
          }
          T *tile = box(t) + 2 * k, *whole = box(all) + 2 * k;
          tile[0] = low, tile[1] = high;
          whole[0] = low < whole[0] ? low : whole[0];
          whole[1] = high > whole[1] ? high : whole[1];
        }
      }
      for (int64_t k = 0; k < o_.d; ++k)
        for (int high = 0; high < 2; ++high) *side(chunk, k, high) = box(all)[2 * k + high];
    });
  }

  /// Room for the visits of one task.
  struct Visits {
    Buffer<T> bounds;
    Buffer<Reach> reached;
    explicit Visits(const Boxes& boxes) : bounds(boxes.chunks_), reached(boxes.chunks_) {}
  };

  /// f(t0, t1, first) for the tiles that can hold what a packed panel of rows looks for. f lowers the bars of the
  /// lists; those of rows with an infinite number or NaN, which have no neighbours, are closed here. How many tiles
  /// there were.
  template <class Score, class F>
  int64_t visit(const T* panel, const Lists<T>& lists, int64_t lanes, Score score, const Visits& visits, F f) const {
    T low[kMostDims], high[kMostDims];
    if (!enclose(panel, lists, lanes, low, high)) return 0;
    const int64_t home = bound(low, high, score, visits.bounds.get());
    f(o_.chunks.tile_begin(home), o_.chunks.tile_end(home), true);
    T most = highest(lists);
    int64_t count = 0, met = o_.chunks.tile_end(home) - o_.chunks.tile_begin(home);
    Reach* reached = visits.reached.get();
    for (int64_t chunk = 0; chunk < o_.chunks.count; ++chunk)
      if (visits.bounds[chunk] <= most && chunk != home)
        reached[count++] = {visits.bounds[chunk], static_cast<int32_t>(chunk)};
    std::sort(reached, reached + count);
    for (int64_t c = 0; c < count && reached[c].bound <= most; ++c) {
      const int64_t chunk = reached[c].chunk, end = o_.chunks.tile_end(chunk);
      if (!wanted(o_.chunks.tiles + chunk, panel, lists, score)) continue;
      for (int64_t t0 = o_.chunks.tile_begin(chunk), t1; t0 < end; t0 = t1 + 1) {
        for (t1 = t0; t1 < end && wanted(t1, panel, lists, score);) ++t1;
        if (t1 > t0) f(t0, t1, false);
        met += t1 - t0;
      }
      most = highest(lists);
    }
    return met;
  }

 private:
  /// The box of a tile, or of a chunk behind all tiles: from and to, by coordinate.
  T* box(int64_t at) const { return boxes_.get() + at * 2 * o_.d; }
  /// The same sides of the chunks, a vector of chunks together.
  T* side(int64_t chunk, int64_t k, int high) const {
    return sides_.get() + ((chunk / L * o_.d + k) * 2 + high) * L + chunk % L;
  }

  /// What no score falls short of, however both were rounded (powers by logarithms, too).
  NEARFAR_INLINE static Vec<T> lowered(Vec<T> bound) {
    constexpr T kPart = 1 - 4096 * std::numeric_limits<T>::epsilon(), kTiny = 64 * std::numeric_limits<T>::min();
    return vmax(bound * kPart - kTiny, Vec<T>{});
  }

  /// The box of a panel; false where no row of it has neighbours.
  bool enclose(const T* panel, const Lists<T>& lists, int64_t lanes, T* low, T* high) const {
    bool some = false;
    for (int64_t k = 0; k < o_.d; ++k) low[k] = kInfinite, high[k] = -kInfinite;
    for (int64_t lane = 0; lane < lanes && lane < NR; ++lane) {
      T zero = 0;
      for (int64_t k = 0; k < o_.d; ++k) zero += panel[k * NR + lane] * 0;
      if (zero != 0) {
        lists.worst[lane] = -kInfinite;
        continue;
      }
      some = true;
      for (int64_t k = 0; k < o_.d; ++k) {
        const T own = panel[k * NR + lane];
        low[k] = own < low[k] ? own : low[k];
        high[k] = own > high[k] ? own : high[k];
      }
    }
    return some;
  }

  /// The least score between a box and those of all chunks; the nearest of these, by the middle of the box where it
  /// touches several.
  template <class Score>
  int64_t bound(const T* low, const T* high, Score score, T* bounds) const {
    int64_t nearest = 0;
    T least[2] = {kInfinite, kInfinite};
    for (int64_t first = 0; first < chunks_; first += L) {
      Vec<T> sum{}, from_middle{};
      for (int64_t k = 0; k < o_.d; ++k) {
        const Vec<T> from = load(side(first, k, 0)), to = load(side(first, k, 1));
        const T middle = low[k] + (high[k] - low[k]) / 2;
        score.accumulate(sum, vmax(vmax(from - high[k], low[k] - to), Vec<T>{}), Vec<T>{});
        score.accumulate(from_middle, vmax(vmax(from - middle, middle - to), Vec<T>{}), Vec<T>{});
      }
      const Vec<T> lowest = lowered(sum);
      store(bounds + first, lowest);
      for (unsigned lanes = lanes_set(lowest <= splat<T>(least[0])); lanes; lanes &= lanes - 1) {
        const int u = __builtin_ctz(lanes);
        if (lowest[u] > least[0] || (lowest[u] == least[0] && !(from_middle[u] < least[1]))) continue;
        least[0] = lowest[u], least[1] = from_middle[u];
        nearest = first + u;
      }
    }
    return nearest < o_.chunks.count ? nearest : 0;
  }

  static T highest(const Lists<T>& lists) {
    Vec<T> most = load(lists.worst);
    for (int v = 1; v < P::kVectors; ++v) most = vmax(load(lists.worst + v * L), most);
    return hmax<T>(most);
  }

  /// Whether the nearest point of a box is nearer than the k-th of a row, or just as near and of a lower index.
  template <class Score>
  NEARFAR_INLINE bool wanted(int64_t at, const T* panel, const Lists<T>& lists, Score score) const {
    const T* sides = box(at);
    Vec<T> sum[P::kVectors] = {};
    for (int64_t k = 0; k < o_.d; ++k)
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) {
        const Vec<T> own = load(panel + k * NR + v * L);
        score.accumulate(sum[v], vmin(vmax(own, splat<T>(sides[2 * k])), splat<T>(sides[2 * k + 1])), own);
      }
    for (int v = 0; v < P::kVectors; ++v)
      if (any(lists.better(lowered(sum[v]), least_[at], v))) return true;
    return false;
  }

  const Operands<T>& o_;
  const int64_t chunks_;  // in whole vectors
  Buffer<T> boxes_;
  Buffer<int32_t> least_;  // the lowest index in each box
  Buffer<T> sides_;
};

}  // namespace
}  // namespace nearfar
