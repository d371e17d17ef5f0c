// Sets of positives among the rows of one array (SupCon): the rows of a class, or what a user's mask says.
//
//   mean_i = mean_{p in P(i)} <x_i, x_p>       and, of a mask, the gradient of sum_i c_i |P(i)| mean_i
//
// No scores are needed: sum_p <x_i, x_p> = <x_i, sum_p x_p>, O(N D) for classes and, for a mask, one look at each of
// its bytes and O(D) for each that is set. Sums are kept in double, since the sum of a class less x_i cancels where the
// class is small. A row that is an anchor's only positive is named instead, as its `partner`: only such anchors can
// have a small loss (with k positives it is at least log k), whose digits Softmax keeps.
#pragma once

#include "cpu/rows.hpp"

namespace nearfar {
namespace {

template <class T>
class PositiveSets {
 public:
  /// Nothing where `which` names no sets.
  PositiveSets(const Positives& which, const Source<T>& x, int threads)
      : which_(which), x_(x), n_(which.classes || which.mask ? x.n() : 0), d_(x.d()), threads_(threads) {
    if (n_ == 0) return;
    count_ = Buffer<int64_t>(n_);
    partner_ = Buffer<int64_t>(n_);
    mean_ = Buffer<double>(n_);
    which.classes ? sort_classes() : copy_rows();
    which.classes ? class_means() : mask_means();
  }

  bool given() const { return n_ > 0; }
  int64_t count(int64_t i) const { return count_[i]; }
  int64_t partner(int64_t i) const { return partner_[i]; }  // the only positive of row i, or -1
  double mean(int64_t i) const { return mean_[i]; }         // where there is no partner
  int64_t anchors() const {
    int64_t anchors = 0;
    for (int64_t i = 0; i < n_; ++i) anchors += count_[i] > 0;
    return anchors;
  }

  bool by_class() const { return given() && which_.classes; }
  /// What a positive of row i has of its anchor's mean, where there are several.
  double share(int64_t i) const { return count_[i] > 1 ? 1 / static_cast<double>(count_[i]) : 0; }
  /// Adds the gradient of sum_i weight(i) mean_i over the anchors of several positives to dx: of a mask. That of
  /// classes is in the weights of pairs.
  template <class F>
  void add_gradient(F weight, T* dx) const {
    Buffer<double> shares(n_);
    for (int64_t i = 0; i < n_; ++i) shares[i] = share(i) * weight(i);
    mask_gradient(shares.get(), dx);
  }

 private:
  static constexpr int64_t kPerTask = 64;

  void add(double* sum, double factor, const T* row) const {
    for (int64_t k = 0; k < d_; ++k) sum[k] += factor * static_cast<double>(row[k]);
  }

  // ---- classes: a class owns its rows

  void sort_classes() {
    first_ = Buffer<int64_t>(n_ + 1);
    member_ = Buffer<int64_t>(n_);
    for (int64_t c = 0; c <= n_; ++c) first_[c] = 0;
    for (int64_t i = 0; i < n_; ++i) ++first_[which_.classes[i] + 1];
    for (int64_t c = 0; c < n_; ++c) first_[c + 1] += first_[c];
    Buffer<int64_t> next(n_);
    for (int64_t c = 0; c < n_; ++c) next[c] = first_[c];
    for (int64_t i = 0; i < n_; ++i) member_[next[which_.classes[i]]++] = i;
  }

  /// f(first member, number of members, workspace of 2 d values) for every class.
  template <class F>
  void for_classes(F f) const {
    parallel_for((n_ + kPerTask - 1) / kPerTask, threads_, [&](int64_t task, int) {
      Buffer<double> work(2 * d_);
      for (int64_t c = task * kPerTask; c < n_ && c < (task + 1) * kPerTask; ++c)
        f(member_.get() + first_[c], first_[c + 1] - first_[c], work.get());
    });
  }

  void class_means() {
    for_classes([&](const int64_t* members, int64_t size, double* sum) {
      for (int64_t m = 0; m < size; ++m) {
        count_[members[m]] = size - 1;
        partner_[members[m]] = size == 2 ? members[1 - m] : -1;
      }
      if (size < 3) return;
      T* row = reinterpret_cast<T*>(sum + d_);
      for (int64_t k = 0; k < d_; ++k) sum[k] = 0;
      for (int64_t m = 0; m < size; ++m) x_.get(members[m], row), add(sum, 1, row);
      for (int64_t m = 0; m < size; ++m) {
        x_.get(members[m], row);
        double dot = 0;
        for (int64_t k = 0; k < d_; ++k) dot += (sum[k] - static_cast<double>(row[k])) * static_cast<double>(row[k]);
        mean_[members[m]] = dot / static_cast<double>(size - 1);
      }
    });
  }

  // ---- a mask between items; row i of x is a view of item i / views

  void copy_rows() {
    rows_ = Buffer<T>(n_ * d_);
    parallel_for(x_.tasks(), threads_, [&](int64_t task, int) {
      for (int64_t i = task * Source<T>::kRowsPerTask; i < x_.end(task); ++i) x_.get(i, rows_.get() + i * d_);
    });
  }
  const T* row(int64_t i) const { return rows_.get() + i * d_; }

  /// f(p) for every positive p of row i whose item is in [begin, end): views of its own item, and what the mask says.
  template <class F>
  void for_positives(int64_t i, int64_t begin, int64_t end, F f) const {
    const int64_t views = which_.views, own = i / views, stride = which_.mask_col_stride;
    const uint8_t* mask = which_.mask + own * which_.mask_row_stride;
    for (int64_t item = begin; item < end;) {
      constexpr int64_t kWord = 8;  // most masks are sparse: eight items at a glance where they lie side by side
      uint64_t word = 1;
      const bool whole = stride == 1 && item + kWord <= end;
      if (whole) std::memcpy(&word, mask + item, kWord);
      const int64_t last = whole ? item + kWord : end;
      if (word == 0 && !(own >= item && own < last)) {
        item = last;
        continue;
      }
      for (; item < last; ++item) {
        if (mask[item * stride] == 0 && item != own) continue;
        for (int64_t p = item * views; p < (item + 1) * views; ++p)
          if (p != i) f(p);
      }
    }
  }

  int64_t items() const { return n_ / which_.views; }

  void mask_means() {
    parallel_for((n_ + kPerTask - 1) / kPerTask, threads_, [&](int64_t task, int) {
      Buffer<double> sum(d_);
      for (int64_t i = task * kPerTask; i < n_ && i < (task + 1) * kPerTask; ++i) {
        int64_t count = 0, only = -1;
        for (int64_t k = 0; k < d_; ++k) sum[k] = 0;
        for_positives(i, 0, items(), [&](int64_t p) {
          ++count;
          only = p;
          add(sum.get(), 1, row(p));
        });
        count_[i] = count;
        partner_[i] = count == 1 ? only : -1;
        double dot = 0;
        for (int64_t k = 0; k < d_; ++k) dot += sum[k] * static_cast<double>(row(i)[k]);
        mean_[i] = count > 0 ? dot / static_cast<double>(count) : 0;
      }
    });
  }

  /// A task owns some items: what their rows get as anchors, and as positives of others, in the order of these.
  void mask_gradient(const double* share, T* dx) const {
    parallel_for((items() + kPerTask - 1) / kPerTask, threads_, [&](int64_t task, int) {
      const int64_t begin = task * kPerTask, end = items() < begin + kPerTask ? items() : begin + kPerTask;
      const int64_t first = begin * which_.views, last = end * which_.views;
      Buffer<double> sums((last - first) * d_);
      for (int64_t k = 0; k < (last - first) * d_; ++k) sums[k] = 0;
      for (int64_t i = 0; i < n_; ++i) {
        if (share[i] == 0) continue;
        for_positives(i, begin, end, [&](int64_t p) { add(sums.get() + (p - first) * d_, share[i], row(i)); });
        if (i >= first && i < last)
          for_positives(i, 0, items(), [&](int64_t p) { add(sums.get() + (i - first) * d_, share[i], row(p)); });
      }
      for (int64_t k = 0; k < (last - first) * d_; ++k) dx[first * d_ + k] += static_cast<T>(sums[k]);
    });
  }

  const Positives which_;
  const Source<T>& x_;
  const int64_t n_, d_;
  const int threads_;
  Buffer<int64_t> count_, partner_, first_, member_;
  Buffer<double> mean_;
  Buffer<T> rows_;
};

}  // namespace
}  // namespace nearfar
