// Alignment: |u_i - v_i|^alpha of paired rows, from the differences (2 - 2 <u, v> loses a quarter of it at distance
// 1e-3 in float32). O(N D), no pairs; here because it reads rows as the other losses do and shares their gradients'
// last step. In double throughout: unit rows rounded to float32 are 6e-8 off, which at distance 1e-3 is 3e-6 of the
// value and 2.5e-5 of the gradient.
#include "cpu/rows.hpp"

namespace nearfar {
namespace {

template <class T>
void run(AlignmentParams<T>& p) {
  const int64_t d = p.x.d;
  Source<double> x(p.x), y(p.y);
  if (p.normalize) {
    x.normalize(p.threads);
    y.normalize(p.threads);
  }
  Buffer<double> values(p.x.n);
  parallel_for(x.tasks(), p.threads, [&](int64_t task, int) {
    Buffer<double> rows(4 * d);
    double *u = rows.get(), *v = u + d, *difference = v + d, *du = difference + d;
    for (int64_t i = task * Source<double>::kRowsPerTask; i < x.end(task); ++i) {
      x.get(i, u);
      y.get(i, v);
      for (int64_t k = 0; k < d; ++k) difference[k] = u[k] - v[k];
      const double square = x.squared_norm(difference);
      values[i] = p.alpha == 2 ? square : std::pow(square, p.alpha / 2);
      if (p.value) p.value[i] = static_cast<T>(values[i]);
      if (!p.dx) continue;
      // The subgradient at distance 0 is 0, for every alpha.
      const double w = p.weights ? static_cast<double>(p.weights[i]) : p.weight;
      const double slope = square == 0 ? 0 : w * p.alpha * (p.alpha == 2 ? 1 : std::pow(square, p.alpha / 2 - 1));
      for (int64_t k = 0; k < d; ++k) {
        du[k] = slope * difference[k];
        difference[k] = -du[k];
      }
      normalize_backward(x, i, u, du);
      normalize_backward(y, i, v, difference);
      for (int64_t k = 0; k < d; ++k) {
        p.dx[i * d + k] = static_cast<T>(du[k]);
        p.dy[i * d + k] = static_cast<T>(difference[k]);
      }
    }
  });
  p.value_sum = 0;
  for (int64_t i = 0; i < p.x.n; ++i) p.value_sum += values[i];
}

}  // namespace

namespace NEARFAR_ISA {
void alignment(AlignmentParams<float>& p) { run(p); }
void alignment(AlignmentParams<double>& p) { run(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
