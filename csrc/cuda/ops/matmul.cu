// Kernel matrix times matrix, K(x, y) v, and its gradient, by strips of K, for a kernel given as a program.
//
//   out_i  = sum_j k(x_i, y_j) v_j
//   dx_i   = sum_j <g_i, v_j> pull_ij (x_i - y_j)     (of <g, K v>; v's own gradient is K(y, x) g: the same operation)
#include "cuda/ops.hpp"
#include "cuda/program.hpp"

namespace nearfar {
namespace {

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
  PackedProgram<T> kernel(c, *p.program, p.parameters_at, p.x, p.y, p.same, false);
  Strip<T, T> strip(c, kernel[0], false, true, nullptr, nullptr);
  kernel.take_others(strip.shape);
  const int64_t n = p.x.n, r = p.v.d;
  c.launch_threads(n * r, Fill<T>{p.out, n * r, T(0)});
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
    kernel.values(weights, true);
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

/// The upstream gradient of k(x_i, y_j) is <g_i, v_j>: scores too.
template <class T>
void matmul_grad(Context& c, const MatmulGradDevice<T>& p) {
  const Pairs<T, T> coefficients(c, p.grad, p.v, false, false, false);
  program_gradient<T>(c, *p.program, p.parameters_at, p.x, p.y, p.dx, p.dy, p.dparameters, true, [&](Weights<T> room) {
    room.near = nullptr;
    launch_scores(c, plan_scores(c, "coefficients", coefficients, room.block), coefficients, room.block,
                  ProgramEpilogue<T, PutScore<T>>{coefficients.scores, room, p.x.n, p.y.n, false, PutScore<T>{false}});
    return room;
  });
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(matmul, MatmulDevice)
NEARFAR_INSTANTIATE(matmul_grad, MatmulGradDevice)
