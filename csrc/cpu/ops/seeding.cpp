// Seeding: greedy k-means++ (Arthur and Vassilvitskii, 2007; greedy local trials as in scikit-learn).
//
// Row i is drawn with probability w_i D_i / sum w D, D_i = min over the chosen of |x_i - x_c|^2. Each step draws
// several candidates and keeps the one that leaves the smallest potential sum_i w_i min(D_i, |x_i - x_candidate|^2).
// One pass over the rows a step: distances (from differences: exact, and memory is the limit), minimum and potential
// fused. Rows lie along the lanes and are packed once where that takes a bounded copy.
#include <utility>

#include "cpu/tile.hpp"

namespace nearfar {
namespace {

constexpr int kMostTogether = 6;  // candidates in registers at once

template <class T>
class Seeding {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr int64_t kRowsPerTask = 2048;
  static constexpr int64_t kPackedBytes = int64_t(1) << 30;

 public:
  explicit Seeding(const SeedingParams<T>& params)
      : p(params), n(p.x.n), d(p.x.d), trials(p.trials), padded_n(ceil_div(n, NR) * NR), x(p.x) {
    if (p.normalize) x.normalize(p.threads);
  }

  void run() {
    tasks_ = ceil_div(n, kRowsPerTask);
    closest_ = Buffer<T>(padded_n);
    candidates_ = Buffer<T>(trials * padded_n);
    potentials_ = Buffer<double>(tasks_ * trials);
    current_ = Buffer<double>(tasks_);
    together_ = ceil_div(trials, ceil_div(trials, kMostTogether));
    groups_ = ceil_div(trials, together_);
    tiles_ = Buffer<T>(groups_ * together_ * d);
    packed_all_ = padded_n * d * static_cast<int64_t>(sizeof(T)) <= kPackedBytes;
    if (packed_all_) {
      panels_ = Buffer<T>(padded_n * d);
      parallel_for(tasks_, p.threads, [&](int64_t task, int) {
        Buffer<T> rows(NR * padded<T>(d));
        for (int64_t i = task * kRowsPerTask; i < end(task); i += NR) pack_panel(i, rows.get(), panels_.get() + i * d);
      });
    }
    for (int64_t i = 0; i < padded_n; ++i) closest_[i] = std::numeric_limits<T>::infinity();
    Buffer<int64_t> drawn(trials);
    p.chosen[0] = drawn[0] = p.first;
    try_candidates(drawn.get(), 1);
    keep(0);
    for (int64_t c = 1; c < p.k; ++c) {
      for (int64_t t = 0; t < trials; ++t) drawn[t] = draw(p.uniforms[(c - 1) * trials + t]);
      try_candidates(drawn.get(), trials);
      int64_t best = 0;
      double least = std::numeric_limits<double>::infinity();
      for (int64_t t = 0; t < trials; ++t) {
        double potential = 0;
        for (int64_t task = 0; task < tasks_; ++task) potential += potentials_[task * trials + t];
        if (potential < least) best = t, least = potential;
      }
      keep(best);
      p.chosen[c] = drawn[best];
    }
  }

 private:
  int64_t end(int64_t task) const { return (task + 1) * kRowsPerTask < n ? (task + 1) * kRowsPerTask : n; }

  void pack_panel(int64_t i, T* rows, T* panel) const {
    read_rows<NR>(x, i, rows);
    pack<NR>(rows, d, T(1), panel);
  }

  double weight(int64_t i) const { return p.weights ? static_cast<double>(p.weights[i]) : 1.0; }

  /// The first row at which the running sum of w D reaches `share` of the whole.
  int64_t draw(double share) const {
    double total = 0;
    for (int64_t task = 0; task < tasks_; ++task) total += current_[task];
    double wanted = share * total;
    int64_t task = 0;
    for (; task + 1 < tasks_ && current_[task] < wanted; ++task) wanted -= current_[task];
    double sum = 0;
    for (int64_t i = task * kRowsPerTask; i < end(task); ++i) {
      sum += weight(i) * static_cast<double>(closest_[i]);
      if (sum >= wanted) return i;
    }
    return end(task) - 1;
  }

  /// candidates_[t][i] = min(closest, distance), and their potentials by task.
  void try_candidates(const int64_t* drawn, int64_t count) {
    Buffer<T> row(d);
    for (int64_t t = 0; t < groups_ * together_; ++t) {
      const T* own = x.view(drawn[t < count ? t : 0], row.get());
      T* tile = tiles_.get() + t / together_ * together_ * d + t % together_;
      for (int64_t c = 0; c < d; ++c) tile[c * together_] = own[c];
    }
    parallel_for(tasks_, p.threads, [&](int64_t task, int) {
      switch (together_) {
        case 1:
          return try_rows<1>(task, count);
        case 2:
          return try_rows<2>(task, count);
        case 3:
          return try_rows<3>(task, count);
        case 4:
          return try_rows<4>(task, count);
        case 5:
          return try_rows<5>(task, count);
        default:
          return try_rows<6>(task, count);
      }
    });
  }

  template <int M>
  void try_rows(int64_t task, int64_t count) {
    Buffer<T> rows, own;
    if (!packed_all_) rows = Buffer<T>(NR * padded<T>(d)), own = Buffer<T>(NR * d);
    double* potentials = potentials_.get() + task * trials;
    for (int64_t t = 0; t < count; ++t) potentials[t] = 0;
    for (int64_t i = task * kRowsPerTask; i < end(task); i += NR) {
      const T* panel = packed_all_ ? panels_.get() + i * d : own.get();
      if (!packed_all_) pack_panel(i, rows.get(), own.get());
      const bool whole = i + NR <= n && !p.weights;
      for (int64_t t0 = 0; t0 < count; t0 += M) {
        Vec<T> acc[M][P::kVectors];
        clear<T>(acc);
        multiply<SquaredDifference, T, M, P::kVectors, 1, M>(d, tiles_.get() + t0 * d, panel, acc);
        for (int r = 0; r < M && t0 + r < count; ++r) {
          T* out = candidates_.get() + (t0 + r) * padded_n + i;
          Vec<T> total = Vec<T>{};
#pragma GCC unroll 2
          for (int v = 0; v < P::kVectors; ++v) {
            const Vec<T> least = vmin(acc[r][v], load(closest_.get() + i + v * kLanes<T>));
            store(out + v * kLanes<T>, least);
            total += least;
          }
          if (whole) {
            potentials[t0 + r] += static_cast<double>(hsum<T>(total));
          } else {
            for (int64_t lane = 0; lane < NR && i + lane < n; ++lane)
              potentials[t0 + r] += weight(i + lane) * static_cast<double>(out[lane]);
          }
        }
      }
    }
  }

  void keep(int64_t best) {
    const T* from = candidates_.get() + best * padded_n;
    parallel_for(tasks_, n < 100000 ? 1 : p.threads, [&](int64_t task, int) {
      for (int64_t i = task * kRowsPerTask; i < end(task); ++i) closest_[i] = from[i];
    });
    for (int64_t task = 0; task < tasks_; ++task) current_[task] = potentials_[task * trials + best];
  }

  const SeedingParams<T>& p;
  const int64_t n, d, trials, padded_n;
  Source<T> x;
  int64_t tasks_ = 0, together_ = 1, groups_ = 1;
  bool packed_all_ = false;
  Buffer<T> panels_, closest_, candidates_, tiles_;
  Buffer<double> potentials_, current_;
};

}  // namespace

namespace NEARFAR_ISA {
void seeding(const SeedingParams<float>& p) { Seeding<float>(p).run(); }
void seeding(const SeedingParams<double>& p) { Seeding<double>(p).run(); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
