// Kernel matrix times matrix, K(x, y) v, and its gradient, by strips of K.
//
//   out_i  = sum_j k(x_i, y_j) v_j
//   dx_i   = sum_j <g_i, v_j> pull_ij (x_i - y_j)     (of <g, K v>; v's own gradient is K(y, x) g: the same operation)
#include "cuda/ops.hpp"
#include "cuda/strip.hpp"

namespace nearfar {
namespace {

/// The map's values; or with `gradient`, the strip's numbers <g_i, v_j> times the pull of the map.
template <class T>
struct KernelEpilogue {
  static constexpr bool kDistances = true;
  Scores<T> scores;
  PairMap map;
  bool gradient;
  int64_t n, m;
  Weights<T> strip;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    const int64_t row = strip.block.row, column = strip.block.column;
    auto inside = [&](int64_t i, int64_t j) { return row + i < n && column + j < m; };
    auto put = [&](int64_t i, int64_t j, T score, bool near) {
      T& place = strip.w[i * strip.pitch + j];
      const T value = map_value(map, score);
      if (!gradient) {
        place = value;
        return;
      }
      place *= map_pull(map, value);
      if (near) strip.mark(row + i, column + j);
    };
    f.for_each(
        [&](int64_t i, int64_t j, T product) {
          return inside(i, j) && scores.must_measure(row + i, column + j, scores(row + i, column + j, product));
        },
        [&](int64_t i, int64_t j, T product) {
          if (inside(i, j)) {
            const T score = scores(row + i, column + j, product);
            put(i, j, score, strip.near && scores.near(row + i, column + j, score));
          } else {
            strip.w[i * strip.pitch + j] = 0;
          }
        },
        [&](int64_t i, int64_t j) { put(i, j, scores.measure(row + i, column + j), true); });
  }
};

/// Products as they are, into the strip.
template <class T>
struct StoreStrip {
  static constexpr bool kDistances = false;
  Weights<T> strip;
  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    f.for_each([&](int64_t i, int64_t j, T value) { strip.w[i * strip.pitch + j] = value; });
  }
};

/// out_i += sum_j w_ij v_j for a few columns of v: a warp a row.
template <class T, int MOST>
struct FewColumns {
  Weights<T> strip;
  Source<T> v;
  int64_t n;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const Block& b = strip.block;
    const int64_t i = cuda::global_warp(), r = v.rows.d;
    if (i >= b.rows || b.row + i >= n) return;
    T sums[MOST] = {};
    for (int64_t j = cuda::lane_index(); j < b.columns && b.column + j < v.rows.n; j += cuda::kWarp) {
      const T w = strip.w[i * strip.pitch + j];
      NEARFAR_UNROLL
      for (int k = 0; k < MOST; ++k)
        if (k < r) sums[k] += w * v.raw(b.column + j, k);
    }
    NEARFAR_UNROLL
    for (int k = 0; k < MOST; ++k) {
      const T total = cuda::warp_sum(sums[k]);
      if (k < r && cuda::lane_index() == 0) out[(b.row + i) * r + k] += total;
    }
  }
};

}  // namespace

namespace cuda {

template <class T>
void matmul(Context& c, const MatmulDevice<T>& p) {
  const Pairs<T, T> pairs(c, p.x, p.y, false, is_distance(p.map), false);
  Strip<T, T> strip(c, pairs, false, true, nullptr, nullptr);
  const int64_t n = p.x.n, r = p.v.d;
  c.launch_threads(n * r, Zero<T>{p.out, n * r});
  constexpr int kFew = 4;
  const bool few = r <= kFew;
  Packed<T, T> v;
  T* parts = nullptr;
  Plan down = plan<T>(c, "kernel times columns", strip.shape.rows, r, strip.shape.columns, true);
  if (!few) {
    v = pack<T>(c, Source<T>{p.v}, static_cast<const T*>(nullptr), false);
    parts = c.take<T>(down.splits * strip.shape.rows * r);
  }
  strip.for_blocks([&](const Weights<T>& weights) {
    const Block& b = weights.block;
    const Plan plan = plan_scores(c, "kernel", pairs, b);
    launch_scores(c, plan, pairs, b, KernelEpilogue<T>{pairs.scores, p.map, false, n, p.y.n, weights});
    if (few) {
      c.launch_warps(b.rows, FewColumns<T, kFew>{weights, Source<T>{p.v}, n, p.out});
      return;
    }
    const Operand<T, true> k{weights.w, weights.pitch};
    const Operand<T, false> columns{v.data + b.column * v.pitch, v.pitch};
    multiply_parts<T, T>(c, down, k, columns, b, r, parts);
    const int64_t valid = b.rows < n - b.row ? b.rows : n - b.row;
    c.launch_threads(valid * r,
                     MergeParts<T>{parts, down.splits, b.rows, valid, r, nullptr, nullptr, 0, p.out + b.row * r});
  });
}

template <class T>
void matmul_grad(Context& c, const MatmulGradDevice<T>& p) {
  const Pairs<T, T> pairs(c, p.x, p.y, false, is_distance(p.map), true);
  const Pairs<T, T> coefficients(c, p.grad, p.v, false, false, false);
  Strip<T, T> strip(c, pairs, false, true, p.dx, p.dy);
  strip.for_blocks([&](const Weights<T>& weights) {
    const Block& b = weights.block;
    strip.clear_near(weights);
    launch_scores(c, plan_scores(c, "coefficients", coefficients, b), coefficients, b, StoreStrip<T>{weights});
    launch_scores(c, plan_scores(c, "kernel weights", pairs, b), pairs, b,
                  KernelEpilogue<T>{pairs.scores, p.map, true, p.x.n, p.y.n, weights});
    strip.products(weights);
  });
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(matmul, MatmulDevice)
NEARFAR_INSTANTIATE(matmul_grad, MatmulGradDevice)
