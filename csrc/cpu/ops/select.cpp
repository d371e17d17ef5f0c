// Select: for every row the k best columns. k-means assignment (k = 1) and k nearest neighbours.
//
// Columns are scanned in ascending order and replace a kept one only when strictly better, so ties go to the lower
// index. The kept candidates are then measured again from the original rows and sorted by (value, index).
#include "cpu/mask.hpp"
#include "cpu/nearest.hpp"

namespace nearfar {
namespace {

template <class T, Key KEY>
class Select {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr bool kMends = KEY == Key::expanded || KEY == Key::cosine;  // small keys are computed again

 public:
  Select(const SelectParams<T>& params, const Operands<T>& operands)
      : p(params), n(p.x.n), m(p.y.n), k(p.k), o(operands), measure{o} {}

  void run() {
    // Few rows: cut the columns too, by the shape alone; parts are merged in order.
    const int64_t strips = ceil_div(n, P::kStripRows), chunks = o.chunks.count;
    splits_ = o.chunks.parts(strips);
    kept_ = Buffer<T>(strips * splits_ * P::kStripRows * k);
    index_ = Buffer<int64_t>(strips * splits_ * P::kStripRows * k);
    parallel_for(strips * splits_, p.threads, [&](int64_t task, int) {
      const int64_t part = task % splits_;
      strip(task / splits_, chunks * part / splits_, chunks * (part + 1) / splits_,
            kept_.get() + task * P::kStripRows * k, index_.get() + task * P::kStripRows * k);
    });
    parallel_for(strips, p.threads, [&](int64_t s, int) { finish(s); });
  }

 private:
  /// One panel of rows while its columns go by.
  struct Panel {
    int64_t row;
    const T* squares;
    T* worst;  // per lane: what a candidate must beat
    T* kept;   // [lane][k], sorted
    int64_t* index;
  };

  void strip(int64_t s, int64_t first, int64_t last, T* kept, int64_t* index) {
    if (k == 1 && !p.exclude_self) return Nearest<T, KEY>(o).strip(s * P::kStripRows, first, last, index);
    const int64_t d = o.d, row = s * P::kStripRows;
    const int64_t panels = ceil_div(n - row < P::kStripRows ? n - row : P::kStripRows, NR);
    Buffer<T> rows(o.row_buffer()), packed(P::kStripRows * d), block(o.chunks.tiles_each * P::MR * NR);
    alignas(64) T squares[P::kStripRows], worst[P::kStripRows];
    for (int64_t q = 0; q < panels; ++q)
      o.pack_panel(row + q * NR, T(1), rows.get(), packed.get() + q * NR * d, squares + q * NR);
    for (int64_t at = 0; at < P::kStripRows * k; ++at) kept[at] = static_cast<T>(kInfinity), index[at] = -1;
    for (int64_t i = 0; i < P::kStripRows; ++i) worst[i] = static_cast<T>(kInfinity);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t t0 = o.chunks.tile_begin(chunk), t1 = o.chunks.tile_end(chunk);
      for (int64_t q = 0; q < panels; ++q) {
        o.raw_block(t0, t1, packed.get() + q * NR * d, block.get());
        const Panel panel{row + q * NR, squares + q * NR, worst + q * NR, kept + q * NR * k, index + q * NR * k};
        scan(block.get(), t0 * P::MR, t1 * P::MR < m ? t1 * P::MR : m, panel);
      }
    }
  }

  NEARFAR_INLINE static Vec<T> squares(const Panel& panel, int v) {
    return KEY == Key::expanded ? load(panel.squares + v * kLanes<T>) : Vec<T>{};
  }

  /// Keys of column j for one vector of lanes; marks pairs so close that the expansion is not to be trusted.
  NEARFAR_INLINE Vec<T> key(const T* scores, int64_t j, Vec<T> own, IVec<T>& near) const {
    const Vec<T> s = load(scores);
    if (KEY == Key::direct) return s;
    if (KEY == Key::negative_dot) return -s;
    if (KEY == Key::cosine) {
      const Vec<T> value = T(1) - s;
      near |= value <= splat<T>(Operands<T>::kNear);
      return value;
    }
    const T square = *o.squares(j);
    const Vec<T> value = own + (splat<T>(square) - T(2) * s);
    near |= value <= (own + splat<T>(square)) * Operands<T>::kNear;
    return value;
  }

  /// The same keys with marked pairs computed from their differences.
  __attribute__((noinline)) void exact_keys(const T* scores, int64_t j, const Panel& panel, T* out) const {
    Buffer<T> rows(2 * o.d);
    for (int v = 0; v < P::kVectors; ++v) {
      IVec<T> near = IVec<T>{};
      const Vec<T> value = key(scores + v * kLanes<T>, j, squares(panel, v), near);
      store(out + v * kLanes<T>, value);
      if (!any(near)) continue;
      for (int u = 0; u < kLanes<T>; ++u) {
        const int64_t lane = v * kLanes<T> + u;
        if (near[u] && panel.row + lane < n) out[lane] = measure.near(panel.row + lane, j, rows.get());
      }
    }
  }

  /// Eight columns at a time; only where their minimum beats a lane's worst are they looked at one by one.
  void scan(const T* scores, int64_t column, int64_t end, const Panel& panel) const {
    constexpr int64_t kAtOnce = 8;
    for (int64_t j0 = column; j0 < end; j0 += kAtOnce) {
      const int64_t j1 = j0 + kAtOnce < end ? j0 + kAtOnce : end;
      IVec<T> look = IVec<T>{};
      for (int v = 0; v < P::kVectors; ++v) {
        const Vec<T> own = squares(panel, v);
        Vec<T> least = splat<T>(static_cast<T>(kInfinity));
        for (int64_t j = j0; j < j1; ++j)
          least = vmin(key(scores + (j - column) * NR + v * kLanes<T>, j, own, look), least);
        look |= least < load(panel.worst + v * kLanes<T>);
      }
      if (!any(look)) continue;
      for (int64_t j = j0; j < j1; ++j) insert(scores + (j - column) * NR, j, panel);
    }
  }

  void insert(const T* scores, int64_t j, const Panel& panel) const {
    alignas(64) T keys[NR];
    IVec<T> near = IVec<T>{};
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> own = squares(panel, v);
      store(keys + v * kLanes<T>, key(scores + v * kLanes<T>, j, own, near));
    }
    if (kMends && any(near)) exact_keys(scores, j, panel, keys);
    for (int v = 0; v < P::kVectors; ++v) {
      const IVec<T> better = load(keys + v * kLanes<T>) < load(panel.worst + v * kLanes<T>);
      if (!any(better)) continue;
      for (int u = 0; u < kLanes<T>; ++u) {
        const int64_t lane = v * kLanes<T> + u;
        if (!better[u] || panel.row + lane >= n || (p.exclude_self && panel.row + lane == j)) continue;
        T* own = panel.kept + lane * k;
        int64_t* own_index = panel.index + lane * k;
        int64_t at = k - 1;
        for (; at > 0 && own[at - 1] > keys[lane]; --at) own[at] = own[at - 1], own_index[at] = own_index[at - 1];
        own[at] = keys[lane];
        own_index[at] = j;
        panel.worst[lane] = own[k - 1];
      }
    }
  }

  /// Merge the parts, measure again, sort.
  void finish(int64_t s) const {
    Buffer<T> rows(2 * o.d), value(splits_ * k);
    Buffer<int64_t> index(splits_ * k);
    for (int64_t i = s * P::kStripRows; i < (s + 1) * P::kStripRows && i < n; ++i) {
      int64_t count = 0;
      for (int64_t part = 0; part < splits_; ++part) {
        const int64_t at = ((s * splits_ + part) * P::kStripRows + i - s * P::kStripRows) * k;
        for (int64_t c = 0; c < k && index_[at + c] >= 0; ++c) {
          const int64_t j = index_[at + c];
          const T own = measure(i, j, rows.get());
          if (!(own < static_cast<T>(kInfinity))) continue;
          int64_t place = count++;
          for (; place > 0 && (value[place - 1] > own || (value[place - 1] == own && index[place - 1] > j)); --place)
            value[place] = value[place - 1], index[place] = index[place - 1];
          value[place] = own;
          index[place] = j;
        }
      }
      for (int64_t c = 0; c < k; ++c) {
        p.value[i * k + c] = c < count ? result(value[c]) : static_cast<T>(__builtin_nan(""));
        p.index[i * k + c] = c < count ? index[c] : -1;
      }
    }
  }

  T result(T value) const {
    if (p.map == PairMap::euclidean) return std::sqrt(value);
    return p.map == PairMap::dot ? -value : value;
  }

  const SelectParams<T>& p;
  const int64_t n, m, k;
  const Operands<T>& o;
  const Measure<T, KEY> measure;
  int64_t splits_ = 1;
  Buffer<T> kept_;
  Buffer<int64_t> index_;
};

template <class T>
void run(const SelectParams<T>& p) {
  const bool distance = p.map == PairMap::euclidean || p.map == PairMap::sqeuclidean;
  const Operands<T> o(p.x, p.y, p.normalize, distance, false, p.threads);
  if (p.map == PairMap::one_minus_dot) return Select<T, Key::cosine>(p, o).run();
  if (!distance) return Select<T, Key::negative_dot>(p, o).run();
  if (o.expanded()) return Select<T, Key::expanded>(p, o).run();
  Select<T, Key::direct>(p, o).run();
}

}  // namespace

namespace NEARFAR_ISA {
void select(const SelectParams<float>& p) { run(p); }
void select(const SelectParams<double>& p) { run(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
