// Select: for every row the k best columns. k-means assignment (k = 1) and k nearest neighbours.
//
// Columns are scanned in ascending order and replace a kept one only when strictly better, so ties go to the lower index.
// The kept candidates are then measured again from the original rows and sorted by (value, index).
#include "cpu/mask.hpp"

namespace nearfar {
namespace {

/// Distances are minimised as they are; dot products as their negatives.
template <class T, bool DISTANCE>
class Select {
  using P = Policy<T>;
  static constexpr int NR = P::NR;

 public:
  explicit Select(const SelectParams<T>& params)
      : p(params), n(p.x.n), m(p.y.n), k(p.k), o(p.x, p.y, p.normalize, DISTANCE, false, p.threads) {}

  void run() {
    // Few rows: cut the columns too, by the shape alone; parts are merged in order.
    const int64_t strips = ceil_div(n, P::kStripRows), chunks = o.chunks.count;
    splits_ = strips >= 16 || chunks == 0 ? 1 : (16 / strips < chunks ? 16 / strips : chunks);
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
  void strip(int64_t s, int64_t first, int64_t last, T* kept, int64_t* index) {
    const int64_t d = o.d, row = s * P::kStripRows;
    const int64_t panels = ceil_div(n - row < P::kStripRows ? n - row : P::kStripRows, NR);
    Buffer<T> rows(NR * d), packed(P::kStripRows * d), block(o.chunks.tiles_each * P::MR * NR);
    alignas(64) T squares[P::kStripRows];
    for (int64_t q = 0; q < panels; ++q)
      o.pack_panel(row + q * NR, T(1), rows.get(), packed.get() + q * NR * d, squares + q * NR);
    for (int64_t at = 0; at < P::kStripRows * k; ++at) kept[at] = static_cast<T>(kInfinity), index[at] = -1;
    // worst[row]: what a candidate must beat.
    alignas(64) T worst[P::kStripRows];
    for (int64_t i = 0; i < P::kStripRows; ++i) worst[i] = static_cast<T>(kInfinity);
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t t0 = o.chunks.tile_begin(chunk), t1 = o.chunks.tile_end(chunk);
      for (int64_t q = 0; q < panels; ++q) {
        o.block(t0, t1, row + q * NR, packed.get() + q * NR * d, squares + q * NR, block.get());
        scan(block.get(), t0 * P::MR, t1 * P::MR < m ? t1 * P::MR : m, row + q * NR, worst + q * NR,
             kept + q * NR * k, index + q * NR * k);
      }
    }
  }

  NEARFAR_INLINE static Vec<T> key(const T* scores) { return DISTANCE ? load(scores) : -load(scores); }

  /// Eight columns at a time: only where their minimum beats a lane's worst are they looked at one by one.
  void scan(const T* scores, int64_t column, int64_t end, int64_t row, T* worst, T* kept, int64_t* index) const {
    constexpr int64_t kAtOnce = 8;
    for (int64_t j0 = column; j0 < end; j0 += kAtOnce) {
      const int64_t j1 = j0 + kAtOnce < end ? j0 + kAtOnce : end;
      IVec<T> better = IVec<T>{};
      for (int v = 0; v < P::kVectors; ++v) {
        const T* s = scores + (j0 - column) * NR + v * kLanes<T>;
        Vec<T> least = key(s);
        for (int64_t j = 1; j < j1 - j0; ++j) least = vmin(key(s + j * NR), least);
        better |= least < load(worst + v * kLanes<T>);
      }
      if (!any(better)) continue;
      for (int64_t j = j0; j < j1; ++j) insert(scores + (j - column) * NR, j, row, worst, kept, index);
    }
  }

  void insert(const T* scores, int64_t j, int64_t row, T* worst, T* kept, int64_t* index) const {
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> value = key(scores + v * kLanes<T>);
      const IVec<T> better = value < load(worst + v * kLanes<T>);
      if (!any(better)) continue;
      for (int u = 0; u < kLanes<T>; ++u) {
        const int64_t lane = v * kLanes<T> + u;
        if (!better[u] || row + lane >= n || (p.exclude_self && row + lane == j)) continue;
        T* own = kept + lane * k;
        int64_t* own_index = index + lane * k;
        int64_t at = k - 1;
        for (; at > 0 && own[at - 1] > value[u]; --at) own[at] = own[at - 1], own_index[at] = own_index[at - 1];
        own[at] = value[u];
        own_index[at] = j;
        worst[lane] = own[k - 1];
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

  T measure(int64_t i, int64_t j, T* rows) const {
    if (DISTANCE) return o.direct_distance(i, j, rows);
    o.x.get(i, rows);
    o.y.get(j, rows + o.d);
    const double s = Source<T>::dot(rows, rows + o.d, o.d);
    return static_cast<T>(p.map == PairMap::one_minus_dot ? 1 - s : -s);
  }

  T result(T value) const {
    if (p.map == PairMap::euclidean) return std::sqrt(value);
    return p.map == PairMap::dot ? -value : value;
  }

  const SelectParams<T>& p;
  const int64_t n, m, k;
  Operands<T> o;
  int64_t splits_ = 1;
  Buffer<T> kept_;
  Buffer<int64_t> index_;
};

template <class T>
void run(const SelectParams<T>& p) {
  if (p.map == PairMap::euclidean || p.map == PairMap::sqeuclidean) {
    Select<T, true>(p).run();
  } else {
    Select<T, false>(p).run();
  }
}

}  // namespace

namespace NEARFAR_ISA {
void select(const SelectParams<float>& p) { run(p); }
void select(const SelectParams<double>& p) { run(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
