// Kernel matrix times matrix, K(x, y) v, and its gradient, by strips of K, for a kernel given as a program.
//
//   out_i  = sum_j k(x_i, y_j) v_j
//   dx_i   = sum_j <g_i, v_j> pull_ij (x_i - y_j)     (of <g, K v>; v's own gradient is K(y, x) g: the same operation)
#include "cuda/loss.hpp"
#include "cuda/program_gradient.hpp"

namespace nearfar {
namespace {

/// Few columns of v are no product for the engine: rows of K times them, a number of each for every row.
constexpr int64_t kFew = 4;
template <class F>
void with_few(int64_t r, F f) {
  if (r == 1) return f(std::integral_constant<int, 1>{});
  if (r == 2) return f(std::integral_constant<int, 2>{});
  if (r == 3) return f(std::integral_constant<int, 3>{});
  f(std::integral_constant<int, 4>{});
}

/// Columns of v one behind the other, zero up to whole tiles.
template <class T>
struct Columns {
  const T* data;
  int64_t padded;
  NEARFAR_DEVICE const T* operator()(int k) const { return data + k * padded; }
};
template <class T>
struct TurnColumns {
  Source<T> v;
  int64_t padded;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const int64_t at = cuda::global_thread(), j = at % padded, k = at / padded;
    if (k < v.rows.d) out[at] = j < v.rows.n ? v.raw(j, k) : T(0);
  }
};

/// Rows of two sets side by side.
template <class T>
struct PutBeside {
  Source<T> first, second;
  int64_t count;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const int64_t width = first.rows.d + second.rows.d, at = cuda::global_thread(), i = at / width, k = at % width;
    if (at < count) out[at] = k < first.rows.d ? first.raw(i, k) : second.raw(i, k - first.rows.d);
  }
};
template <class T>
Rows beside(cuda::Context& c, const Rows& first, const Rows& second) {
  Rows both = first;
  both.d = both.row_stride = first.d + second.d;
  both.col_stride = 1;
  both.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  T* out = c.take<T>(both.n * both.d);
  c.launch_threads(both.n * both.d, PutBeside<T>{{first}, {second}, both.n * both.d, out});
  both.data = out;
  return both;
}

/// out_i += sum_j w_ij v_j of a strip: a warp a row.
template <class T, int R>
struct FewColumns {
  Weights<T> strip;
  Columns<T> columns;
  int64_t n;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const Block& b = strip.block;
    const int64_t i = cuda::global_warp();
    if (i >= b.rows || b.row + i >= n) return;
    T sums[R] = {};
    const int lane = cuda::lane_index();
    const T* line = strip.w + i * strip.pitch;
    constexpr int kAhead = kPadRows / cuda::kWarp;
    for (int64_t j = lane; j < b.columns; j += kPadRows) {
      NEARFAR_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const int64_t at = j + u * cuda::kWarp;
        NEARFAR_UNROLL
        for (int k = 0; k < R; ++k) sums[k] += line[at] * columns(k)[b.column + at];
      }
    }
    NEARFAR_UNROLL
    for (int k = 0; k < R; ++k) {
      const T total = cuda::warp_sum(sums[k]);
      if (lane == 0) out[(b.row + i) * R + k] += total;
    }
  }
};

/// The same of the Gaussian, from the tile: K is nowhere. A part of every row by tile.
template <class T, int R>
struct GaussianTimesColumns {
  static constexpr bool kDistances = true;
  Scores<T> scores;
  Block block;
  int64_t n, m;
  const T* parameter;
  Columns<T> columns;
  int64_t tiles_n;
  T* of_rows;  // [row][column of v][tile_n]

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t tile_n, int64_t) const {
    const int64_t j0 = block.column + f.j0;
    scores.apply(f, block.row + f.i0, j0, outside(f, block, n, m));
    const GaussianStep<T> step(parameter);
    f.for_each([&](int64_t, int64_t, T& value) { value = step.value(value); });
    reduce_sums<P, R>(
        [&](int a, T(&sums)[R]) {
          NEARFAR_UNROLL
          for (int k = 0; k < R; ++k) {
            sums[k] = 0;
            NEARFAR_UNROLL
            for (int b = 0; b < P::kCols; ++b) sums[k] += f(a, b) * columns(k)[j0 + P::col(b)];
          }
        },
        [&](int i, const T(&totals)[R]) {
          NEARFAR_UNROLL
          for (int k = 0; k < R; ++k) of_rows[((f.i0 + i) * R + k) * tiles_n + tile_n] = totals[k];
        });
  }
};
template <class T>
struct StoreTotals {
  const double* totals;
  int64_t count;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const int64_t at = cuda::global_thread();
    if (at < count) out[at] = static_cast<T>(totals[at]);
  }
};

template <class T>
void gaussian_times_columns(cuda::Context& c, const PackedProgram<T>& kernel, const Columns<T>& columns, int64_t r,
                            T* out) {
  const Pairs<T, T>& pairs = kernel[0];
  const int64_t n = pairs.x.n, m = pairs.y.n;
  const StripShape shape = tile_blocks(c, pairs, r);
  T* of_rows = c.take<T>(shape.rows * r * tiles_of(shape));
  double* totals = c.take<double>(n * r);
  c.launch_threads(n * r, Fill<double>{totals, n * r, 0});
  for_tile_blocks(c, pairs, r, [&](const Block& b) {
    const TiledBlock<T, T> own(c, "kernel times few columns", pairs, b);
    with_few(r, [&](auto few) {
      constexpr int R = decltype(few)::value;
      launch_scores(
          c, own.plan, pairs, b,
          GaussianTimesColumns<T, R>{pairs.scores, b, n, m, kernel.program.parameter, columns, own.tiles_n, of_rows});
    });
    c.launch_warps(own.valid * r, MergeSums<T>{of_rows, own.tiles_n, own.valid * r, totals + b.row * r});
  });
  c.launch_threads(n * r, StoreTotals<T>{totals, n * r, out});
}

}  // namespace

namespace cuda {

template <class T>
void matmul(Context& c, const MatmulDevice<T>& p) {
  PackedProgram<T> kernel(c, *p.program, p.parameters_at, p.x, p.y, p.same, false);
  const int64_t n = p.x.n, r = p.v.d;
  if (r == 0) return;
  const Source<T> v{p.v};
  Columns<T> few{nullptr, kernel[0].y.padded};
  if (r <= kFew) {
    T* turned = c.take<T>(few.padded * r);
    c.launch_threads(few.padded * r, TurnColumns<T>{v, few.padded, turned});
    few.data = turned;
    if (kernel.program.is_gaussian()) return gaussian_times_columns(c, kernel, few, r, p.out);
  }
  Strip<T, T> strip(c, kernel[0], false, true, nullptr, nullptr);
  kernel.take_others(strip.shape);
  c.launch_threads(n * r, Fill<T>{p.out, n * r, T(0)});
  Packed<T, T> packed;
  T* parts = nullptr;
  Plan down = plan<T>(c, "kernel times columns", strip.shape.rows, r, strip.shape.columns, true);
  if (!few.data) {
    packed = pack<T>(c, v, static_cast<const T*>(nullptr), false);
    parts = c.take<T>(down.splits * strip.shape.rows * r);
  }
  strip.for_blocks([&](const Weights<T>& weights) {
    const Block& b = weights.block;
    kernel.values(weights, true);
    if (few.data)
      return with_few(r, [&](auto count) {
        c.launch_warps(b.rows, FewColumns<T, decltype(count)::value>{weights, few, n, p.out});
      });
    const Operand<T, true> k{weights.w, weights.pitch};
    const Operand<T, false> columns{packed.data + b.column * packed.pitch, packed.pitch};
    multiply_parts<T, T>(c, down, k, columns, b, r, parts);
    const int64_t valid = b.rows < n - b.row ? b.rows : n - b.row;
    MergeParts<T>::launch(c, {parts, down.splits, b.rows, valid, r, nullptr, nullptr, 0, p.out + b.row * r});
  });
}

/// The upstream gradient of k(x_i, y_j) is <g_i, v_j>: scores too. Where y is x, <g_i, v_j> + <g_j, v_i> is that of
/// both orders, one score of both side by side: then rows have it all, and columns need no product.
template <class T>
void matmul_grad(Context& c, const MatmulGradDevice<T>& p) {
  const Pairs<T, T> coefficients(c, p.same ? beside<T>(c, p.grad, p.v) : p.grad,
                                 p.same ? beside<T>(c, p.v, p.grad) : p.v, false, false, false);
  const auto upstream = [&](Weights<T> room) {
    room.near = nullptr;
    put_scores(c, "coefficients", coefficients, room);
    return room;
  };
  program_gradient<T>(c, *p.program, p.parameters_at, p.x, p.y, p.dx, p.same ? nullptr : p.dy, p.dparameters, true,
                      upstream, p.same ? 0.5 : 1);
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(matmul, MatmulDevice)
NEARFAR_INSTANTIATE(matmul_grad, MatmulGradDevice)
