// Seeding: greedy k-means++ from given random numbers, see cpu/ops/seeding.cpp. Every step draws candidates, measures
// them against all rows, and keeps the best: all of it on the device, so that the host waits for nothing.
#include <limits>

#include "cuda/ops.hpp"
#include "cuda/strip.hpp"

namespace nearfar {
namespace {

/// What lives from step to step. A task is a run of rows whose sums are kept.
template <class T>
struct Seeds {
  static constexpr int64_t kRows = 1024;
  Source<T> x;
  const T* weights;  // null: 1
  int64_t n, tasks, trials;
  T* closest;          // (n) squared distance to the nearest chosen row
  T* candidates;       // (trials, n) the same with each candidate chosen too
  double* potentials;  // (tasks, trials) sums of weight times candidates
  double* current;     // (tasks) those of what was chosen
  int64_t* drawn;      // (trials)
  int64_t* best;       // which of them was chosen

  NEARFAR_DEVICE double weight(int64_t i) const { return weights ? static_cast<double>(weights[i]) : 1.0; }
  NEARFAR_DEVICE int64_t end(int64_t task) const { return (task + 1) * kRows < n ? (task + 1) * kRows : n; }
};

/// A block a task and candidate, a warp a row.
template <class T>
struct TryCandidates {
  Seeds<T> s;
  int64_t count;  // of candidates

  NEARFAR_DEVICE void operator()() const {
    const int64_t task = cuda::block_index() / count, t = cuda::block_index() % count, row = s.drawn[t];
    double sum = 0;
    for (int64_t i = task * Seeds<T>::kRows + cuda::warp_index(); i < s.end(task); i += cuda::kWarps) {
      T square = 0;
      for (int64_t k = cuda::lane_index(); k < s.x.rows.d; k += cuda::kWarp) {
        const T difference = s.x.get(i, k) - s.x.get(row, k);
        square += difference * difference;
      }
      square = cuda::warp_sum(square);
      if (cuda::lane_index() > 0) continue;
      const T least = square < s.closest[i] ? square : s.closest[i];
      s.candidates[t * s.n + i] = least;
      sum += s.weight(i) * static_cast<double>(least);
    }
    sum = block_sum(sum);
    if (cuda::thread_index() == 0) s.potentials[task * s.trials + t] = sum;
  }
};

/// The candidate of least potential, the first of these: one block.
template <class T>
struct Choose {
  Seeds<T> s;
  int64_t count;
  int64_t* chosen;

  NEARFAR_DEVICE void operator()() const {
    const int thread = cuda::thread_index();
    int64_t best = 0;
    double least = infinity<double>();
    for (int64_t t = 0; t < count; ++t) {
      double part = 0;
      for (int64_t task = thread; task < s.tasks; task += cuda::kThreads) part += s.potentials[task * s.trials + t];
      const double potential = block_sum(part);
      if (potential < least) best = t, least = potential;
    }
    for (int64_t task = thread; task < s.tasks; task += cuda::kThreads)
      s.current[task] = s.potentials[task * s.trials + best];
    if (thread > 0) return;
    *s.best = best;
    *chosen = s.drawn[best];
  }
};

template <class T>
struct KeepBest {
  Seeds<T> s;
  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    if (i < s.n) s.closest[i] = s.candidates[*s.best * s.n + i];
  }
};

/// The first of `count` > 0 numbers at which their running sum, from `sum` on, reaches `wanted`, or else the last; by a
/// warp. `sum` becomes that of what comes before it.
template <class F>
NEARFAR_DEVICE int64_t first_reaching(double wanted, int64_t count, F value, double& sum) {
  const int lane = cuda::lane_index();
  double before = sum;
  for (int64_t base = 0; base < count; base += cuda::kWarp) {
    const int64_t at = base + lane;
    const double own = at < count ? value(at) : 0;
    double running = own;
    for (int delta = 1; delta < cuda::kWarp; delta *= 2) {
      const double other = cuda::shuffle_up(running, delta);
      if (lane >= delta) running += other;
    }
    const uint32_t reached = cuda::ballot(at < count && sum + running >= wanted);
    const int64_t rest = count - base;
    const bool last = rest <= cuda::kWarp;
    const int from = reached ? cuda::lowest_bit(reached) : last ? static_cast<int>(rest) - 1 : cuda::kWarp - 1;
    before = sum + cuda::shuffle(running - own, from);
    if (reached || last) {
      sum = before;
      return base + from;
    }
    sum += cuda::shuffle(running, from);
  }
  return count - 1;
}

/// Rows drawn with probability weight times closest, a warp each: the first at which the running sum reaches a share.
template <class T>
struct Draw {
  Seeds<T> s;
  const double* uniforms;

  NEARFAR_DEVICE void operator()() const {
    const int64_t t = cuda::global_warp();
    if (t >= s.trials) return;
    double total = 0;
    for (int64_t task = cuda::lane_index(); task < s.tasks; task += cuda::kWarp) total += s.current[task];
    const double wanted = uniforms[t] * cuda::warp_sum(total);
    double sum = 0;
    const int64_t task = first_reaching(wanted, s.tasks, [&](int64_t at) { return s.current[at]; }, sum);
    const int64_t begin = task * Seeds<T>::kRows;
    const int64_t row = first_reaching(
        wanted, s.end(task) - begin,
        [&](int64_t at) { return s.weight(begin + at) * static_cast<double>(s.closest[begin + at]); }, sum);
    if (cuda::lane_index() == 0) s.drawn[t] = begin + row;
  }
};

}  // namespace

namespace cuda {

template <class T>
void seeding(Context& c, const SeedingParams<T>& p) {
  const int64_t n = p.x.n, trials = p.trials, tasks = ceil_div(n, Seeds<T>::kRows);
  const Seeds<T> s{source_of<T>(c, p.x, p.normalize),
                   p.weights,
                   n,
                   tasks,
                   trials,
                   c.take<T>(n),
                   c.take<T>(trials * n),
                   c.take<double>(tasks * trials),
                   c.take<double>(tasks),
                   c.take<int64_t>(trials),
                   c.take<int64_t>(1)};
  c.launch_threads(n, Fill<T>{s.closest, n, std::numeric_limits<T>::infinity()});
  c.launch_threads(1, Fill<int64_t>{s.drawn, 1, p.first});
  for (int64_t step = 0; step < p.k; ++step) {
    const int64_t count = step > 0 ? trials : 1;
    if (step > 0) c.launch_warps(trials, Draw<T>{s, p.uniforms + (step - 1) * trials});
    c.launch(tasks * count, TryCandidates<T>{s, count});
    c.launch(1, Choose<T>{s, count, p.chosen + step});
    c.launch_threads(n, KeepBest<T>{s});
  }
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(seeding, SeedingParams)
