// An order of rows in which near ones are together, for searches in few dimensions. Answers do not depend on it.
#pragma once

#include <algorithm>

#include "cpu/operands.hpp"

namespace nearfar {
namespace {

/// Whether a search among m columns of d dimensions has them in such an order. To order a row takes about as long as
/// two thousand pairs (k = 1), to visit with it as four thousand; and where rows are spread evenly, boxes rule out less
/// in more dimensions, unless there are more of them.
inline bool arranges(Screening mode, int64_t n, int64_t m, int64_t d) {
  constexpr int64_t kMostDims = 8, kOrder = 2048, kVisit = 4096, kSpread = 1024;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (d > Operands<float>::kDirectDims || n > kMost || m > kMost) return false;
  const bool pays = d <= kMostDims && m >= kVisit && m >= kSpread << d / 2 && n * m >= kOrder * (n + m);
  return mode == Screening::always || (mode == Screening::automatic && pays);
}

/// Rows in halves by their widest coordinate, cut at multiples of `group` rows and within groups of `least`; equal ones
/// by index, so that runs of equal rows ascend.
template <class T>
class Arrangement {
 public:
  /// Of the rows as they are given.
  Arrangement(const Source<T>& source, int64_t group, int64_t least, int threads)
      : n_(source.n()), d_(source.d()), group_(group), least_(least), points_(n_ * d_), entries_(n_), order_(n_) {
    parallel_for(source.tasks(), threads, [&](int64_t task, int) {
      for (int64_t i = task * Source<T>::kRowsPerTask; i < source.end(task); ++i) {
        source.get(i, points_.get() + i * d_);
        entries_[i].value = static_cast<uint32_t>(i);
      }
    });
    // Together down to where there is work for all threads, then each part to its end.
    constexpr int64_t kAlone = 4096;
    Buffer<int64_t> cuts(2);
    int64_t parts = 1;
    cuts[0] = 0, cuts[1] = n_;
    for (bool more = n_ > kAlone; more;) {
      Buffer<int64_t> finer(2 * parts + 1);
      finer[0] = 0;
      for (int64_t s = 0; s < parts; ++s) {
        finer[2 * s + 1] = middle(cuts[s], cuts[s + 1]);
        finer[2 * s + 2] = cuts[s + 1];
      }
      parallel_for(parts, threads, [&](int64_t s, int) { halve(cuts[s], finer[2 * s + 1], cuts[s + 1]); });
      more = finer[1] > kAlone;  // the first part is the largest
      cuts = static_cast<Buffer<int64_t>&&>(finer);
      parts *= 2;
    }
    parallel_for(parts, threads, [&](int64_t s, int) { arrange(cuts[s], cuts[s + 1]); });
    for (int64_t at = 0; at < n_; ++at) order_[at] = static_cast<int32_t>(entries_[at].value);
    points_ = Buffer<T>();
    entries_ = Buffer<Entry>();
  }

  const int32_t* order() const { return order_.get(); }

 private:
  /// A coordinate, from the least on, above the number of its row.
  struct Entry {
    uint64_t value;
    bool operator<(const Entry& other) const { return value < other.value; }
  };

  int64_t middle(int64_t begin, int64_t end) const {
    const int64_t unit = end - begin > group_ ? group_ : least_;
    return begin + (ceil_div(end - begin, unit) + 1) / 2 * unit;
  }

  void arrange(int64_t begin, int64_t end) {
    if (end - begin <= least_) return;
    const int64_t half = middle(begin, end);
    halve(begin, half, end);
    arrange(begin, half);
    arrange(half, end);
  }

  /// By the coordinate that is widest in a few of the rows, over finite numbers.
  void halve(int64_t begin, int64_t half, int64_t end) {
    constexpr T kMost = std::numeric_limits<T>::max();
    constexpr int64_t kFew = 32;
    const int64_t step = end - begin > kFew ? (end - begin) / kFew : 1;
    int64_t widest = 0;
    T most = -1, from = 0;
    for (int64_t k = 0; k < d_; ++k) {
      T low = kMost, high = -kMost;
      for (int64_t at = begin; at < end; at += step) {
        const T own = coordinate(at, k);
        low = own < low && own >= -kMost ? own : low;
        high = own > high && own <= kMost ? own : high;
      }
      if (high - low > most) most = high - low, widest = k, from = low;
    }
    for (int64_t at = begin; at < end; ++at) {
      const float above = static_cast<float>(coordinate(at, widest) - from);  // small beside what all have in common
      uint32_t bits;
      std::memcpy(&bits, &above, sizeof bits);
      bits ^= bits >> 31 ? 0xffffffffu : 0x80000000u;  // now in the order of the numbers
      entries_[at].value = static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(entries_[at].value);
    }
    Entry* first = entries_.get();
    if (half < end) std::nth_element(first + begin, first + half, first + end);
  }

  T coordinate(int64_t at, int64_t k) const { return points_[static_cast<uint32_t>(entries_[at].value) * d_ + k]; }

  int64_t n_, d_, group_, least_;
  Buffer<T> points_;
  Buffer<Entry> entries_;
  Buffer<int32_t> order_;
};

}  // namespace
}  // namespace nearfar
