// Lloyd: one iteration of k-means in one pass over the data.
//
//   label_i = argmin_k |x_i - c_k|^2,   sums_k = sum over label_i = k of w_i x_i,   counts_k = sum of w_i
//
// A strip of rows is assigned (nearest.hpp) and added to the sums of its centroids while it is in cache. Sums are in
// float64 whatever the data: a mean of a million float32 rows keeps its digits. A block of strips owns one partial of
// the sums, and the number of blocks is decided by the shape, so the result does not depend on the number of threads.
#include "cpu/nearest.hpp"

namespace nearfar {
namespace {

template <class T, Key KEY>
class Lloyd {
  using P = Policy<T>;

 public:
  Lloyd(LloydParams<T>& params, const Operands<T>& operands, const Screen* screen = nullptr)
      : p(params), n(p.x.n), d(p.x.d), k(p.centroids.n), o(operands), measure{o}, screen_(screen) {}

  void run() {
    strips_ = ceil_div(n, P::kStripRows);
    // Partial sums take at most about a quarter of the memory of x, but there are enough of them that a thread which is
    // held up leaves little to wait for.
    int64_t blocks = p.sums ? n * static_cast<int64_t>(sizeof(T)) / (32 * k) : strips_;
    blocks = blocks < 8 ? 8 : blocks > 64 ? 64 : blocks;
    blocks_ = blocks < strips_ ? blocks : strips_;
    if (p.sums) {
      sums_ = Buffer<double>(blocks_ * k * d);
      counts_ = Buffer<double>(blocks_ * k);
    }
    inertia_ = Buffer<double>(blocks_);
    changed_ = Buffer<int64_t>(blocks_);
    // A task ends within a second, so that a long call can be stopped.
    const double flops = 2.0 * P::kStripRows * static_cast<double>(k * d);
    const int64_t each = flops < 1e10 ? static_cast<int64_t>(1e10 / flops) : 1;
    for (int64_t done = 0; done == 0 || done < ceil_div(strips_, blocks_ ? blocks_ : 1); done += each)
      parallel_for(blocks_, p.threads, [&](int64_t block, int) { run_block(block, done, each); });
    merge();
  }

 private:
  void run_block(int64_t block, int64_t done, int64_t each) {
    const int64_t begin = strips_ * block / blocks_ + done;
    int64_t end = strips_ * (block + 1) / blocks_;
    if (end > begin + each) end = begin + each;
    double* sums = p.sums ? sums_.get() + block * k * d : nullptr;
    double* counts = p.sums ? counts_.get() + block * k : nullptr;
    if (done == 0) {
      inertia_[block] = 0;
      changed_[block] = 0;
      if (sums)
        for (int64_t c = 0; c < k * d; ++c) sums[c] = 0;
      if (sums)
        for (int64_t c = 0; c < k; ++c) counts[c] = 0;
    }
    Nearest<T, KEY> nearest(o, screen_);
    Buffer<T> rows(2 * d);
    int64_t index[P::kStripRows], changed = 0;
    double inertia = 0;
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t row = strip * P::kStripRows, last = row + P::kStripRows < n ? row + P::kStripRows : n;
      nearest.strip(row, index);
      for (int64_t i = row; i < last; ++i) {
        int64_t j = index[i - row];
        const double weight = p.weights ? static_cast<double>(p.weights[i]) : 1.0;
        if (p.distances) {
          T distance = j >= 0 ? measure(i, j, rows.get()) : std::numeric_limits<T>::quiet_NaN();
          if (!std::isfinite(distance)) j = -1, distance = std::numeric_limits<T>::quiet_NaN();
          p.distances[i] = distance;
          inertia += weight * static_cast<double>(distance);
        }
        changed += p.labels[i] != j;
        p.labels[i] = j;
        if (!sums || j < 0) continue;
        add(o.x.view(i, rows.get()), weight, sums + j * d);
        counts[j] += weight;
      }
    }
    inertia_[block] += inertia;
    changed_[block] += changed;
  }

  void add(const T* __restrict row, double weight, double* __restrict sum) const {
    for (int64_t c = 0; c < d; ++c) sum[c] += weight * static_cast<double>(row[c]);
  }

  void merge() {
    p.inertia = 0;
    p.changed = 0;
    for (int64_t b = 0; b < blocks_; ++b) p.inertia += inertia_[b], p.changed += changed_[b];
    if (!p.sums) return;
    parallel_for(k, k * d * blocks_ < 100000 ? 1 : p.threads, [&](int64_t c, int) {
      double* out = p.sums + c * d;
      for (int64_t e = 0; e < d; ++e) out[e] = 0;
      p.counts[c] = 0;
      for (int64_t b = 0; b < blocks_; ++b) {
        const double* part = sums_.get() + (b * k + c) * d;
        for (int64_t e = 0; e < d; ++e) out[e] += part[e];
        p.counts[c] += counts_[b * k + c];
      }
    });
  }

  LloydParams<T>& p;
  const int64_t n, d, k;
  const Operands<T>& o;
  const Measure<T, KEY> measure;
  const Screen* screen_;
  int64_t strips_ = 0, blocks_ = 0;
  Buffer<double> sums_, counts_, inertia_;
  Buffer<int64_t> changed_;
};

template <class T>
void run(LloydParams<T>& p) {
  const Operands<T> o(p.x, p.centroids, p.normalize, true, false, p.threads);
  if constexpr (std::is_same_v<T, float>)
    if (o.expanded() && screens(p.screening, p.centroids.n, o.d, 1)) {
      const Screen screen(o, p.threads);
      return Lloyd<T, Key::expanded>(p, o, &screen).run();
    }
  if (o.expanded()) return Lloyd<T, Key::expanded>(p, o).run();
  Lloyd<T, Key::direct>(p, o).run();
}

}  // namespace

namespace NEARFAR_ISA {
void lloyd(LloydParams<float>& p) { run(p); }
#if !defined(NEARFAR_BASE)  // which a level with a base takes from there
void lloyd(LloydParams<double>& p) { run(p); }
#endif
}  // namespace NEARFAR_ISA
}  // namespace nearfar
