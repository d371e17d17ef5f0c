// Gaussian potential: log sum_{i<j} exp(-t |x_i - x_j|^2) and its gradient (Wang & Isola 2020).
//
// The normaliser is one number, so the gradient needs no second look at the scores: weights are exp(-t r + t r_0) with
// a reference r_0, summed while they are used, and divided by their sum at the end. On the sphere r <= 4, so r_0 = 0
// will do unless t is large; else r_0 is the least distance, found by a pass of its own.
#include "cpu/mask.hpp"

namespace nearfar {
namespace {

template <class T>
struct LeastCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;

  void map(const Block<T>& b) {
    mask.apply(b);
    for (int64_t p = 0; p < b.panels; ++p)
      for (int64_t k = 0; k < b.columns * P::NR; k += kLanes<T>) {
        T* place = &least[b.chunk * kLanes<T>];
        store(place, vmin(load(b.panel(p) + k), load(place)));
      }
  }
  void close(int64_t, int64_t, int64_t) {}
  const T* factor(int64_t) const { return nullptr; }

  const Mask<T>& mask;
  Buffer<T> least;  // per chunk and lane
};

template <class T>
struct PotentialCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;

  void map(const Block<T>& b) {
    mask.apply(b);
    for (int64_t p = 0; p < b.panels; ++p)
      for (int v = 0; v < P::kVectors; ++v) {
        T* s = b.panel(p) + v * kLanes<T>;
        Vec<T> total = Vec<T>{};
        for (int64_t j = 0; j < b.columns; ++j) {
          const Vec<T> w = exp_flush((splat<T>(reference) - load(s + j * P::NR)) * splat<T>(t));
          total += w;
          store(s + j * P::NR, w);
        }
        sums[b.chunk] += static_cast<double>(hsum<T>(total));
      }
  }
  void close(int64_t, int64_t, int64_t) {}
  const T* factor(int64_t) const { return nullptr; }

  const Mask<T>& mask;
  T t, reference;
  Buffer<double> sums;  // per chunk
};

template <class T>
void run(PotentialParams<T>& p) {
  const int64_t n = p.x.n, d = p.x.d;
  Operands<T> o(p.x, p.x, p.normalize, true, p.dx != nullptr, p.threads);
  const Mask<T> mask{o, kInfinity, true};
  StripPlan<T> plan;
  plan.triangle = true;
  plan.threads = p.threads;

  T reference = 0;
  constexpr double kSafeExponent = 60;
  if (!p.normalize || 4 * p.t > kSafeExponent) {
    LeastCell<T> cell{mask, Buffer<T>(o.chunks.count * kLanes<T>)};
    for (int64_t k = 0; k < o.chunks.count * kLanes<T>; ++k) cell.least[k] = static_cast<T>(kInfinity);
    StripPass<T, LeastCell<T>>(o, cell, plan).run();
    double least = kInfinity;
    for (int64_t k = 0; k < o.chunks.count * kLanes<T>; ++k)
      if (static_cast<double>(cell.least[k]) < least) least = static_cast<double>(cell.least[k]);
    if (least < kInfinity) reference = static_cast<T>(least);
  }

  PotentialCell<T> cell{mask, static_cast<T>(p.t), reference, Buffer<double>(o.chunks.count)};
  for (int64_t c = 0; c < o.chunks.count; ++c) cell.sums[c] = 0;
  Buffer<T> dy;
  if (p.dx) {
    dy = Buffer<T>(n * d);
    for (int64_t k = 0; k < n * d; ++k) dy[k] = 0;
    plan.dx = p.dx;
    plan.dy = dy.get();
  }
  StripPass<T, PotentialCell<T>>(o, cell, plan).run();
  double total = 0;
  for (int64_t c = 0; c < o.chunks.count; ++c) total += cell.sums[c];
  p.log_sum = std::log(total) - p.t * static_cast<double>(reference);
  if (!p.dx) return;
  const T scale = static_cast<T>(-2 * p.t / total);
  parallel_for(o.x.tasks(), p.threads, [&](int64_t task, int) {
    Buffer<T> unit(d);
    for (int64_t i = task * Source<T>::kRowsPerTask; i < o.x.end(task); ++i) {
      T* g = p.dx + i * d;
      for (int64_t k = 0; k < d; ++k) g[k] = scale * (g[k] + dy[i * d + k]);
      o.x.get(i, unit.get());
      normalize_backward(o.x, i, unit.get(), g);
    }
  });
}

}  // namespace

namespace NEARFAR_ISA {
void potential(PotentialParams<float>& p) { run(p); }
void potential(PotentialParams<double>& p) { run(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
