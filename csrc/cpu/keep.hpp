// What is kept of a block of scores: the columns that are among the k best of a row so far.
#pragma once

#include "cpu/lists.hpp"
#include "cpu/nearest.hpp"

namespace nearfar {
namespace {

template <class T, Key KEY, class Score>
class Keep {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr bool kMends = KEY == Key::expanded || KEY == Key::cosine;  // small keys are computed again

 public:
  /// One panel of rows while its columns go by.
  struct Panel {
    int64_t row;
    const T* packed;
    const T* squares;
    const T* columns;  // squares of all columns, by column
    Lists<T> lists;
  };

  Keep(const Operands<T>& operands, const Measure<T, KEY, Score>& exact, int64_t most, bool without_self)
      : o(operands), measure(exact), k(most), exclude_self(without_self) {}

  /// The key of a score, of a number or of a vector of lanes, for rows and a column of these squared norms; marks pairs
  /// so close that the expansion is not to be trusted.
  template <class V, class M>
  NEARFAR_INLINE static V key(V s, V own, V square, M& near) {
    if (KEY == Key::direct || KEY == Key::coordinate) return s;
    if (KEY == Key::negative_dot) return -s;
    if (KEY == Key::cosine) {
      const V value = T(1) - s;
      near |= value <= V{} + Operands<T>::kNear;
      return value;
    }
    const V value = own + (square - T(2) * s);
    near |= value <= (own + square) * Operands<T>::kNear;
    return value;
  }

  /// What candidates must beat before there are k, or the first columns all would: a number that at least k columns
  /// beat, found by bisection. Counted are pairs of columns of which one does.
  void set_bars(const T* scores, int64_t column, int64_t end, const Panel& panel) const {
    constexpr int64_t kGroup = 2, kMost = P::kTilesPerChunk * P::MR / kGroup;
    constexpr int kSteps = 7;
    const int64_t groups = (end - column) / kGroup, wanted = k + exclude_self;
    if (groups <= wanted) return;
    const Vec<T> infinity = splat<T>(static_cast<T>(kInfinity));
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> own = squares(panel, v);
      alignas(64) T least[kMost * kLanes<T>];
      Vec<T> low = infinity, high = -infinity;
      for (int64_t g = 0; g < groups; ++g) {
        Vec<T> both = infinity;
        for (int64_t j = column + g * kGroup; j < column + (g + 1) * kGroup; ++j) {
          IVec<T> near = IVec<T>{};
          const Vec<T> value = key(scores + (j - column) * NR + v * kLanes<T>, j, panel, own, near);
          both = vmin(select(near, infinity, value), both);  // near pairs have other keys
        }
        store(least + g * kLanes<T>, both);
        low = vmin(both, low);
        high = vmax(select(both < infinity, both, -infinity), high);
      }
      Vec<T> bar = load(panel.lists.worst + v * kLanes<T>);
      for (int step = 0; step < kSteps; ++step) {
        const Vec<T> middle = low + (high - low) / 2;
        IVec<T> beat = IVec<T>{};
        for (int64_t g = 0; g < groups; ++g) beat -= load(least + g * kLanes<T>) < middle;
        const IVec<T> enough = beat >= isplat<T>(static_cast<IntOf<T>>(wanted));
        high = select(enough, middle, high);
        low = select(enough, low, middle);
        bar = select(enough & (middle < bar), middle, bar);
      }
      store(panel.lists.worst + v * kLanes<T>, bar);
    }
  }

  /// Eight columns at a time; only where their minimum beats a lane's worst are they looked at one by one. ARRANGED:
  /// not in ascending order, so that an equal one of a lower index beats it too.
  template <bool ARRANGED>
  void scan(const T* scores, int64_t column, int64_t end, const Panel& panel) const {
    constexpr int64_t kAtOnce = 8;
    for (int64_t j0 = column; j0 < end; j0 += kAtOnce) {
      const int64_t j1 = j0 + kAtOnce < end ? j0 + kAtOnce : end;
      IVec<T> look = IVec<T>{}, near = IVec<T>{};
      for (int v = 0; v < P::kVectors; ++v) {
        const Vec<T> own = squares(panel, v);
        Vec<T> least = splat<T>(static_cast<T>(kInfinity));
        for (int64_t j = j0; j < j1; ++j)
          least = vmin(key(scores + (j - column) * NR + v * kLanes<T>, j, panel, own, near), least);
        look |= beats<ARRANGED>(least, panel, v);
      }
      if (kMends) look |= near;
      if (!any(look)) continue;
      for (int64_t j = j0; j < j1; ++j) insert<ARRANGED>(scores + (j - column) * NR, j, panel);
    }
  }

 private:
  NEARFAR_INLINE static Vec<T> squares(const Panel& panel, int v) {
    return KEY == Key::expanded ? load(panel.squares + v * kLanes<T>) : Vec<T>{};
  }

  NEARFAR_INLINE static Vec<T> key(const T* scores, int64_t j, const Panel& panel, Vec<T> own, IVec<T>& near) {
    return key(load(scores), own, KEY == Key::expanded ? splat<T>(panel.columns[j]) : Vec<T>{}, near);
  }

  /// The same keys with marked pairs computed from their differences.
  __attribute__((noinline)) void exact_keys(const T* scores, int64_t j, const Panel& panel, T* out) const {
    Buffer<T> rows(2 * o.d);
    for (int v = 0; v < P::kVectors; ++v) {
      IVec<T> near = IVec<T>{};
      const Vec<T> value = key(scores + v * kLanes<T>, j, panel, squares(panel, v), near);
      store(out + v * kLanes<T>, value);
      if (!any(near)) continue;
      for (int u = 0; u < kLanes<T>; ++u) {
        const int64_t lane = v * kLanes<T> + u;
        if (near[u] && panel.row + lane < o.x.n()) out[lane] = measure.near(panel.row + lane, j, rows.get());
      }
    }
  }

  /// ARRANGED: or may beat it.
  template <bool ARRANGED>
  NEARFAR_INLINE static IVec<T> beats(Vec<T> keys, const Panel& panel, int v) {
    const Vec<T> worst = load(panel.lists.worst + v * kLanes<T>);
    return ARRANGED ? keys <= worst : keys < worst;
  }

  template <bool ARRANGED>
  void insert(const T* scores, int64_t j, const Panel& panel) const {
    const int64_t column = o.y.row_at(j);
    alignas(64) T keys[NR];
    IVec<T> near = IVec<T>{};
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> own = squares(panel, v);
      store(keys + v * kLanes<T>, key(scores + v * kLanes<T>, j, panel, own, near));
    }
    if (kMends && any(near)) exact_keys(scores, j, panel, keys);
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> own = load(keys + v * kLanes<T>);
      unsigned better = lanes_set(beats<ARRANGED>(own, panel, v));
      if (ARRANGED && better) better = lanes_set(panel.lists.better(own, column, v));
      for (; better; better &= better - 1) {
        const int64_t lane = v * kLanes<T> + __builtin_ctz(better);
        if (!exclude_self || o.x.row_at(panel.row + lane) != column) panel.lists.keep(keys[lane], column, lane);
      }
    }
  }

  const Operands<T>& o;
  const Measure<T, KEY, Score>& measure;
  const int64_t k;
  const bool exclude_self;
};

}  // namespace
}  // namespace nearfar
