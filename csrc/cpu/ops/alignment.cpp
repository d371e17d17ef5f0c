// Alignment: |u_i - v_i|^alpha of paired rows, from the differences (2 - 2 <u, v> loses a quarter of it at distance 1e-3
// in float32). O(N D), no pairs; here because it reads rows as the other losses do and shares their gradients' last step.
#include "cpu/rows.hpp"

namespace nearfar {
namespace {

template <class T>
void run(AlignmentParams<T>& p) {
  const int64_t d = p.x.d;
  Source<T> x(p.x), y(p.y);
  if (p.normalize) {
    x.normalize(p.threads);
    y.normalize(p.threads);
  }
  Buffer<double> values(p.x.n);
  parallel_for(x.tasks(), p.threads, [&](int64_t task, int) {
    Buffer<T> rows(3 * d);
    T *u = rows.get(), *v = u + d, *difference = v + d;
    for (int64_t i = task * Source<T>::kRowsPerTask; i < x.end(task); ++i) {
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
        p.dx[i * d + k] = static_cast<T>(slope) * difference[k];
        p.dy[i * d + k] = -p.dx[i * d + k];
      }
      normalize_backward(x, i, u, p.dx + i * d);
      normalize_backward(y, i, v, p.dy + i * d);
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
