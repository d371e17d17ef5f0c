// Alignment: |u_i - v_i|^alpha of paired rows, from the differences, in double throughout: see cpu/ops/alignment.cpp.
#include "cuda/finish.hpp"
#include "cuda/ops.hpp"

namespace nearfar {
namespace {

using cuda::AlignmentDevice;

/// A warp a pair.
template <class T>
struct AlignRows {
  Source<double> x, y;
  double alpha;
  const T* weights;  // null: `weight`
  double weight;
  T* value;
  double* wide;
  T *dx, *dy;  // null: value only

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp(), d = x.rows.d;
    if (i >= x.rows.n) return;
    double square = 0, along_x = 0, along_y = 0;
    for (int64_t k = cuda::lane_index(); k < d; k += cuda::kWarp) {
      const double u = x.get(i, k), v = y.get(i, k), difference = u - v;
      square += difference * difference;
      along_x += u * difference;
      along_y += v * difference;
    }
    square = cuda::warp_sum(square);
    const double own = alpha == 2 ? square : pow(square, alpha / 2);
    if (cuda::lane_index() == 0) {
      value[i] = static_cast<T>(own);
      wide[i] = own;
    }
    if (!dx) return;
    along_x = x.inverse ? cuda::warp_sum(along_x) : 0;
    along_y = y.inverse ? cuda::warp_sum(along_y) : 0;
    // The subgradient at distance 0 is 0, for every alpha.
    const double w = weights ? static_cast<double>(weights[i]) : weight;
    const double slope = square == 0 ? 0 : w * alpha * (alpha == 2 ? 1 : pow(square, alpha / 2 - 1));
    for (int64_t k = cuda::lane_index(); k < d; k += cuda::kWarp) {
      const double u = x.get(i, k), v = y.get(i, k), difference = u - v;
      dx[i * d + k] = static_cast<T>(x.scale(i) * slope * (difference - u * along_x));
      dy[i * d + k] = static_cast<T>(y.scale(i) * slope * (v * along_y - difference));
    }
  }
};

}  // namespace

namespace cuda {
template <class T>
void alignment(Context& c, const AlignmentDevice<T>& p) {
  const Source<double> x = source_of<double>(c, p.x, p.normalize), y = source_of<double>(c, p.y, p.normalize);
  double* wide = c.take<double>(p.x.n);
  c.launch_warps(p.x.n, AlignRows<T>{x, y, p.alpha, p.weights, p.weight, p.value, wide, p.dx, p.dy});
  c.launch(1, StoreSum{{wide, p.x.n}, p.value_total});
}
}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(alignment, AlignmentDevice)
