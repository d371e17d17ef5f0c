// A labelled batch, ready for mining: rows with their classes, sums over few pairs, order statistics.
#pragma once

#include "cpu/strip.hpp"

namespace nearfar {
namespace {

/// Contiguous copies of the rows (normalised if asked for) with their classes; with `grouped` the rows of a class lie
/// side by side, so that an anchor's positives are one range of columns. Rows with NaN or inf are left out: no distance
/// to them orders or sums.
template <class T>
class Batch {
 public:
  Batch(const Rows& rows, const int32_t* codes, int64_t classes, bool normalize, bool grouped, int threads)
      : source(rows), n(rows.n), d(rows.d) {
    if (normalize) source.normalize(threads);
    finite_ = Buffer<uint8_t>(n);
    parallel_for(source.tasks(), threads, [&](int64_t task, int) {
      Buffer<T> row(d);
      for (int64_t i = task * Source<T>::kRowsPerTask; i < source.end(task); ++i) {
        source.get(i, row.get());
        int bad = 0;
        for (int64_t k = 0; k < d; ++k) bad |= !(row[k] - row[k] == 0);
        finite_[i] = !bad;
      }
    });
    begin_ = Buffer<int64_t>(classes + 1);
    for (int64_t c = 0; c <= classes; ++c) begin_[c] = 0;
    for (int64_t i = 0; i < n; ++i) begin_[codes[i] + 1] += finite_[i];
    for (int64_t c = 0; c < classes; ++c) begin_[c + 1] += begin_[c];
    m = begin_[classes];
    largest = 0;
    for (int64_t c = 0; c < classes; ++c)
      if (begin_[c + 1] - begin_[c] > largest) largest = begin_[c + 1] - begin_[c];
    order = Buffer<int64_t>(m);
    if (grouped) {
      Buffer<int64_t> next(classes);
      for (int64_t c = 0; c < classes; ++c) next[c] = begin_[c];
      for (int64_t i = 0; i < n; ++i)
        if (finite_[i]) order[next[codes[i]]++] = i;
    } else {
      int64_t next = 0;
      for (int64_t i = 0; i < n; ++i)
        if (finite_[i]) order[next++] = i;
    }
    const int64_t padded_rows = ceil_div(m, Policy<T>::kStripRows) * Policy<T>::kStripRows;
    code = Buffer<IntOf<T>>(padded_rows);
    for (int64_t r = 0; r < padded_rows; ++r) code[r] = r < m ? codes[order[r]] : -1;
    points = Buffer<T>(m * d);
    parallel_for(ceil_div(m, Source<T>::kRowsPerTask), threads, [&](int64_t task, int) {
      for (int64_t r = task * Source<T>::kRowsPerTask; r < (task + 1) * Source<T>::kRowsPerTask && r < m; ++r)
        source.get(order[r], points.get() + r * d);
    });
  }

  Rows rows() const { return {points.get(), m, d, d, 1, sizeof(T) == 8 ? DType::f64 : DType::f32}; }
  bool finite(int64_t i) const { return finite_[i]; }
  /// The columns of row r's class: [begin, end), when grouped.
  int64_t begin(int64_t r) const { return begin_[code[r]]; }
  int64_t end(int64_t r) const { return begin_[code[r] + 1]; }
  /// How many rows are of r's class, r included.
  int64_t size(int64_t r) const { return end(r) - begin(r); }
  /// Ordered pairs of different rows of a class.
  int64_t pairs() const {
    int64_t sum = 0;
    for (int64_t r = 0; r < m; ++r) sum += size(r) - 1;
    return sum;
  }
  /// Has positives and negatives.
  bool is_anchor(int64_t r) const { return size(r) > 1 && size(r) < m; }

  Source<T> source;
  const int64_t n, d;
  int64_t m = 0, largest = 0;  // rows kept, rows of the largest class
  Buffer<int64_t> order;       // the row of x that is row r here
  Buffer<IntOf<T>> code;       // classes, padded to whole strips by -1
  Buffer<T> points;            // (m, d)

 private:
  Buffer<uint8_t> finite_;
  Buffer<int64_t> begin_;
};

/// Pairs (row of a strip, column) with weights w: each adds w (x_i - x_j) to the gradient of row i and takes it from
/// that of row j. Few pairs: a product of matrices would multiply zeros.
template <class T>
class Pulls {
 public:
  template <class Capacity>
  void open(int64_t rows, Capacity capacity) {
    start_[0] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      count_[r] = 0;
      start_[r + 1] = start_[r] + capacity(r);
    }
    if (start_[rows] <= size_) return;
    size_ = start_[rows];
    columns_ = Buffer<int64_t>(size_);
    weights_ = Buffer<T>(size_);
  }

  void add(int64_t r, int64_t column, T weight) {
    if (weight == 0) return;
    const int64_t at = start_[r] + count_[r]++;
    columns_[at] = column;
    weights_[at] = weight;
  }

  /// The same as one row of a matrix of weights.
  void spread(int64_t r, T* weights, int64_t columns) const {
    for (int64_t j = 0; j < columns; ++j) weights[j] = 0;
    for (int64_t e = start_[r]; e < start_[r] + count_[r]; ++e) weights[columns_[e]] += weights_[e];
  }

  /// Coordinates are cut among threads: no two write the same entry, and every sum keeps its order.
  void apply(int64_t row, int64_t rows, const Batch<T>& batch, T* grad, int threads) const {
    constexpr int64_t kSlice = 64, L = kLanes<T>;
    const int64_t d = batch.d;
    const T* points = batch.points.get();
    parallel_for(ceil_div(d, kSlice), threads, [&](int64_t slice, int) {
      const int64_t k0 = slice * kSlice, size = d - k0 < kSlice ? d - k0 : kSlice;
      for (int64_t r = 0; r < rows; ++r) {
        const T* own = points + (row + r) * d + k0;
        alignas(64) T sum[kSlice] = {};
        for (int64_t e = start_[r]; e < start_[r] + count_[r]; ++e) {
          const T* other = points + columns_[e] * d + k0;
          T* out = grad + columns_[e] * d + k0;
          const T weight = weights_[e];
          int64_t k = 0;
          for (; k + L <= size; k += L) {
            const Vec<T> pull = (load(own + k) - load(other + k)) * splat<T>(weight);
            store(sum + k, load(sum + k) + pull);
            store(out + k, load(out + k) - pull);
          }
          for (; k < size; ++k) {
            const T pull = (own[k] - other[k]) * weight;
            sum[k] += pull;
            out[k] -= pull;
          }
        }
        for (int64_t k = 0; k < size; ++k) grad[(row + r) * d + k0 + k] += sum[k];
      }
    });
  }

 private:
  int64_t start_[Policy<T>::kStripRows + 1], count_[Policy<T>::kStripRows];
  int64_t size_ = 0;
  Buffer<int64_t> columns_;
  Buffer<T> weights_;
};

/// Sorts keys that are not negative, and what they belong to, ascending; equal keys keep their order. A radix sort: the
/// bits of such numbers order as integers. `other_*` are of the same size.
template <class T>
void sort_keys(T* key, int64_t* index, T* other_key, int64_t* other_index, int64_t n) {
  constexpr int64_t kFew = 48;
  if (n <= kFew) {
    for (int64_t k = 1; k < n; ++k) {
      const T own = key[k];
      const int64_t own_index = index[k];
      int64_t at = k;
      for (; at > 0 && key[at - 1] > own; --at) key[at] = key[at - 1], index[at] = index[at - 1];
      key[at] = own;
      index[at] = own_index;
    }
    return;
  }
  using U = IntOf<T>;
  T *from = key, *to = other_key;
  int64_t *from_index = index, *to_index = other_index;
  for (unsigned shift = 0; shift < 8 * sizeof(T); shift += 8) {
    auto digit = [&](T value) {
      U bits;
      std::memcpy(&bits, &value, sizeof bits);
      return (bits >> shift) & 255;
    };
    int64_t place[257] = {};
    for (int64_t k = 0; k < n; ++k) ++place[digit(from[k]) + 1];
    if (place[digit(from[0]) + 1] == n) continue;  // all alike
    for (int b = 0; b < 256; ++b) place[b + 1] += place[b];
    for (int64_t k = 0; k < n; ++k) {
      const int64_t at = place[digit(from[k])]++;
      to[at] = from[k];
      to_index[at] = from_index[k];
    }
    T* const spare = from;
    int64_t* const spare_index = from_index;
    from = to, from_index = to_index;
    to = spare, to_index = spare_index;
  }
  if (from == key) return;
  std::memcpy(key, from, n * sizeof(T));
  std::memcpy(index, from_index, n * sizeof(int64_t));
}

/// For each of `count` values how many of n >= 1 sorted keys lie below it (kOrEqual: or equal it). Eight binary
/// searches side by side, which take the same number of steps.
constexpr int64_t kSearches = 8;
template <bool kOrEqual, class T>
NEARFAR_INLINE void rank_among(const T* key, int64_t n, const T* value, int64_t count, int64_t (&rank)[kSearches]) {
  T own[kSearches];
  for (int64_t u = 0; u < kSearches; ++u) {
    own[u] = value[u < count ? u : 0];
    rank[u] = 0;
  }
  auto below = [](T a, T b) { return static_cast<int64_t>(kOrEqual ? a <= b : a < b); };
  // In a trained batch most negatives are farther than every positive.
  int64_t above_all = 0;
  for (int64_t u = 0; u < kSearches; ++u) above_all += below(key[n - 1], own[u]);
  if (above_all == kSearches) {
    for (int64_t u = 0; u < kSearches; ++u) rank[u] = n;
    return;
  }
  int64_t length = n;
  for (; length > 1; length -= length / 2)
#pragma GCC unroll 8
    for (int64_t u = 0; u < kSearches; ++u) rank[u] += below(key[rank[u] + length / 2 - 1], own[u]) * (length / 2);
#pragma GCC unroll 8
  for (int64_t u = 0; u < kSearches; ++u) rank[u] += below(key[rank[u]], own[u]);
}

}  // namespace
}  // namespace nearfar
