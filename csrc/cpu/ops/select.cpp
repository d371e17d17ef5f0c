// Select: for every row the k best columns. k-means assignment (k = 1) and k nearest neighbours.
//
// Columns are scanned in ascending order and replace a kept one only when strictly better, so ties go to the lower
// index. The kept candidates are then measured again from the original rows and sorted by (value, index).
#include <type_traits>

#include "cpu/mask.hpp"
#include "cpu/screen.hpp"

namespace nearfar {
namespace {

/// What is minimised: the squared distance, direct or expanded here in the scan, 1 - <u, v> of unit rows, or the
/// negative dot product.
enum class Key { direct, expanded, cosine, negative_dot };

template <class T, Key KEY>
class Select {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr bool kDistance = KEY == Key::direct || KEY == Key::expanded;
  static constexpr bool kScreens = std::is_same_v<T, float> && KEY != Key::direct;
  static constexpr bool kMends = KEY == Key::expanded || KEY == Key::cosine;  // small keys are computed again

 public:
  /// screen: null where every column is scored in full.
  Select(const SelectParams<T>& params, const Operands<T>& operands, const Screen* screen)
      : p(params), n(p.x.n), m(p.y.n), k(p.k), o(operands), screen_(screen) {}

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
    const int64_t d = o.d, row = s * P::kStripRows;
    const int64_t panels = ceil_div(n - row < P::kStripRows ? n - row : P::kStripRows, NR);
    Buffer<T> rows(o.row_buffer()), packed(P::kStripRows * d), block(o.chunks.tiles_each * P::MR * NR);
    Buffer<uint32_t> pairs(screen_ ? panels * screen_->panel_size() : 0);
    alignas(64) T squares[P::kStripRows], worst[P::kStripRows], norm[P::kStripRows], lost[P::kStripRows];
    for (int64_t q = 0; q < panels; ++q) {
      o.pack_panel(row + q * NR, T(1), rows.get(), packed.get() + q * NR * d, squares + q * NR);
      if constexpr (kScreens)
        if (screen_)
          screen_->pack_panel(packed.get() + q * NR * d, pairs.get() + q * screen_->panel_size(), norm + q * NR,
                              lost + q * NR);
    }
    for (int64_t at = 0; at < P::kStripRows * k; ++at) kept[at] = static_cast<T>(kInfinity), index[at] = -1;
    for (int64_t i = 0; i < P::kStripRows; ++i) worst[i] = static_cast<T>(kInfinity);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t t0 = o.chunks.tile_begin(chunk), t1 = o.chunks.tile_end(chunk);
      for (int64_t q = 0; q < panels; ++q) {
        const Panel panel{row + q * NR, squares + q * NR, worst + q * NR, kept + q * NR * k, index + q * NR * k};
        // Nothing can be screened out before something is kept.
        if constexpr (kScreens)
          if (screen_ && (best_only() || chunk > first)) {
            screened(chunk, packed.get() + q * NR * d, pairs.get() + q * screen_->panel_size(), norm + q * NR,
                     lost + q * NR, block.get(), panel);
            continue;
          }
        o.raw_block(t0, t1, packed.get() + q * NR * d, block.get());
        const int64_t end = t1 * P::MR < m ? t1 * P::MR : m;
        if (best_only()) {
          scan_best(block.get(), t0 * P::MR, end, panel);
        } else {
          scan(block.get(), t0 * P::MR, end, panel);
        }
      }
    }
  }

  bool best_only() const { return k == 1 && !p.exclude_self; }

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
        if (near[u] && panel.row + lane < n) out[lane] = near_key(panel.row + lane, j, rows.get());
      }
    }
  }

  /// k = 1: the running minimum of every lane, in registers.
  void scan_best(const T* scores, int64_t column, int64_t end, const Panel& panel) const {
    Vec<T> best[P::kVectors], own[P::kVectors];
    IVec<T> where[P::kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < P::kVectors; ++v) {
      best[v] = load(panel.worst + v * kLanes<T>);
      own[v] = squares(panel, v);
      where[v] = isplat<T>(-1);
    }
    for (int64_t j = column; j < end; ++j) {
      const T* s = scores + (j - column) * NR;
      Vec<T> value[P::kVectors];
      IVec<T> near = IVec<T>{};
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) value[v] = key(s + v * kLanes<T>, j, own[v], near);
      if (kMends && any(near)) {
        alignas(64) T exact[NR];
        exact_keys(s, j, panel, exact);
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) value[v] = load(exact + v * kLanes<T>);
      }
      const IVec<T> here = isplat<T>(static_cast<IntOf<T>>(j - column));
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) {
        const IVec<T> better = value[v] < best[v];
        best[v] = select(better, value[v], best[v]);
        where[v] = select(better, here, where[v]);
      }
    }
    for (int v = 0; v < P::kVectors; ++v) {
      store(panel.worst + v * kLanes<T>, best[v]);
      store(panel.kept + v * kLanes<T>, best[v]);
      for (int u = 0; u < kLanes<T>; ++u)
        if (where[v][u] >= 0) panel.index[v * kLanes<T> + u] = column + where[v][u];
    }
  }

  /// k > 1: eight columns at a time; only where their minimum beats a lane's worst are they looked at one by one.
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

  /// Approximate keys of a chunk, and exact ones only for the columns that may be better than what is kept. `norm` and
  /// `lost` are those of Screen::pack_panel.
  void screened(int64_t chunk, const T* packed, const uint32_t* pairs, const T* norm, const T* lost, T* scores,
                const Panel& panel) const {
    constexpr int64_t kAtOnce = 8;
    const int64_t column = o.chunks.tile_begin(chunk) * P::MR, last = o.chunks.tile_end(chunk) * P::MR;
    const int64_t end = last < m ? last : m;
    screen_->block(chunk, pairs, scores);
    Vec<T> bound[P::kVectors], limit[P::kVectors];
    IVec<T> near = IVec<T>{};  // approximate keys are not mended
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> own = squares(panel, v), own_norm = load(norm + v * kLanes<T>);
      bound[v] = key_bound(chunk, own, screen_->bound(chunk, own_norm, load(lost + v * kLanes<T>)));
      Vec<T> worst = load(panel.worst + v * kLanes<T>);
      if (best_only()) {
        Vec<T> least = splat<T>(static_cast<T>(kInfinity));
        for (int64_t j = column; j < end; ++j)
          least = vmin(key(scores + (j - column) * NR + v * kLanes<T>, j, own, near), least);
        worst = vmin(least + bound[v], worst);
      }
      limit[v] = worst + bound[v];
      // Lanes without a row, and rows that are at no distance from anything, look at nothing.
      IVec<T> idle = isplat<T>(static_cast<IntOf<T>>(v * kLanes<T>)) + iota<T>() >=
                     isplat<T>(static_cast<IntOf<T>>(n - panel.row < NR ? n - panel.row : NR));
      if (KEY != Key::negative_dot) idle |= ~(own_norm < splat<T>(static_cast<T>(kInfinity)));
      limit[v] = select(idle, splat<T>(static_cast<T>(-kInfinity)), limit[v]);
    }
    // Not above the limit, so that NaN, which no bound covers, is looked at.
    auto looks = [&](int64_t j, int v) {
      return ~(key(scores + (j - column) * NR + v * kLanes<T>, j, squares(panel, v), near) > limit[v]);
    };
    int64_t found[Screen::kColumns];
    int count = 0;
    auto settle = [&] {
      alignas(64) T exact[Screen::kColumns * NR];
      screen_->exact(found, count, packed, exact);
      for (int c = 0; c < count; ++c) insert(exact + c * NR, found[c], panel);
      for (int v = 0; v < P::kVectors; ++v) limit[v] = vmin(load(panel.worst + v * kLanes<T>) + bound[v], limit[v]);
      count = 0;
    };
    for (int64_t j0 = column; j0 < end; j0 += kAtOnce) {
      const int64_t j1 = j0 + kAtOnce < end ? j0 + kAtOnce : end;
      IVec<T> look = IVec<T>{};
      for (int v = 0; v < P::kVectors; ++v)
        for (int64_t j = j0; j < j1; ++j) look |= looks(j, v);
      if (!any(look)) continue;
      for (int64_t j = j0; j < j1; ++j) {
        look = IVec<T>{};
        for (int v = 0; v < P::kVectors; ++v) look |= looks(j, v);
        if (!any(look)) continue;
        found[count++] = j;
        if (count == Screen::kColumns) settle();
      }
    }
    if (count) settle();
  }

  /// From the bound of a dot product to that of a key; a mended key differs from the expansion by its rounding.
  NEARFAR_INLINE Vec<T> key_bound(int64_t chunk, Vec<T> own, Vec<T> bound) const {
    const T rounding = static_cast<T>(2 * o.d + 16) * 0x1p-24f, norm = screen_->norm(chunk);
    if (KEY == Key::expanded) return T(2) * bound + (own + norm * norm) * rounding;
    return KEY == Key::cosine ? bound + rounding : bound;
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
          T own = measure(i, j, rows.get());
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

  /// From the differences of the rows; of unit rows, 1 - <u, v> = |u - v|^2 / 2.
  T near_key(int64_t i, int64_t j, T* rows) const {
    const T square = o.direct_distance(i, j, rows);
    return KEY == Key::cosine ? square / 2 : square;
  }

  T measure(int64_t i, int64_t j, T* rows) const {
    if (kDistance) return near_key(i, j, rows);
    o.x.get(i, rows);
    o.y.get(j, rows + o.d);
    const double s = Source<T>::dot(rows, rows + o.d, o.d);
    if (KEY == Key::negative_dot) return static_cast<T>(-s);
    return 1 - s <= Operands<T>::kNear ? near_key(i, j, rows) : static_cast<T>(1 - s);
  }

  T result(T value) const {
    if (p.map == PairMap::euclidean) return std::sqrt(value);
    return p.map == PairMap::dot ? -value : value;
  }

  const SelectParams<T>& p;
  const int64_t n, m, k;
  const Operands<T>& o;
  const Screen* screen_;
  int64_t splits_ = 1;
  Buffer<T> kept_;
  Buffer<int64_t> index_;
};

template <class T, Key KEY>
void run(const SelectParams<T>& p, const Operands<T>& o) {
  if constexpr (std::is_same_v<T, float> && KEY != Key::direct) {
    const bool wanted = p.screening == Screening::always || (p.screening == Screening::automatic && screening_pays());
    if (wanted && o.d >= Screen::kLeastDims) {
      const Screen screen(o, p.threads);
      return Select<T, KEY>(p, o, &screen).run();
    }
  }
  Select<T, KEY>(p, o, nullptr).run();
}

template <class T>
void run(const SelectParams<T>& p) {
  const bool distance = p.map == PairMap::euclidean || p.map == PairMap::sqeuclidean;
  const Operands<T> o(p.x, p.y, p.normalize, distance, false, p.threads);
  if (p.map == PairMap::one_minus_dot) return run<T, Key::cosine>(p, o);
  if (!distance) return run<T, Key::negative_dot>(p, o);
  if (o.expanded()) return run<T, Key::expanded>(p, o);
  run<T, Key::direct>(p, o);
}

}  // namespace

namespace NEARFAR_ISA {
void select(const SelectParams<float>& p) { run(p); }
void select(const SelectParams<double>& p) { run(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
