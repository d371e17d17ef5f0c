// Sigmoid loss over pairs: SigLIP. What is computed is said in cpu/ops/sigmoid.cpp.
//
// There is no normaliser, so one product gives losses and weights: a block of weights at a time, then both products of
// the gradient, three in all. Every tile leaves the sums of its rows, of losses and of weights, merged in order. The
// diagonal is not in the blocks; it is computed from its two rows, in double.
#include "cuda/loss.hpp"

namespace nearfar {
namespace {

using cuda::SigmoidDevice;
using std::log1p;

/// The bias of the logits. One that is not finite is NaN.
struct Bias {
  Number number;
  NEARFAR_DEVICE double operator()() const {
    const double bias = number();
    return fabs(bias) < infinity<double>() ? bias : not_a_number<double>();
  }
};

/// log(1 + e^l) and its derivative, from one exponential.
template <class T>
NEARFAR_DEVICE void softplus_sigmoid(T l, T& softplus, T& sigmoid) {
  const T e = exp_flush(l < 0 ? l : -l);
  softplus = (l < 0 ? T(0) : l) + log1p(e);
  sigmoid = (l < 0 ? e : T(1)) / (T(1) + e);
}

template <class T>
struct SigmoidEpilogue {
  static constexpr bool kDistances = false, kBlocked = true;
  static constexpr int kSums = 2;  // of a row of a tile: losses, weights
  Scores<T> scores;
  Multiplier multiplier;
  Bias bias;
  const T* weights;  // upstream gradient of each row; null: `weight`
  T weight;
  Weights<T> out;  // w null: not stored
  Block block;
  int64_t n, m, tiles_n;
  bool matched;  // pairs (i, i) are not here
  T* of_rows;    // [row][which][tile_n]

  NEARFAR_DEVICE bool has(int64_t i, int64_t j) const { return i < n && j < m && !(matched && i == j); }
  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t tile_n, int64_t) const {
    if constexpr (is_blocked<P>) return apply_blocked(f, tile_n);
    const T scale = static_cast<T>(multiplier()), shift = static_cast<T>(bias());
    reduce_sums<P, kSums>(
        [&](int a, T(&sums)[kSums]) {
          const int64_t i = block.row + f.i(a);
          const T upstream = i < n ? (weights ? weights[i] : weight) : T(0);
          sums[0] = sums[1] = 0;
          NEARFAR_UNROLL
          for (int b = 0; b < P::kCols; ++b) {
            const int64_t j = block.column + f.j(b);
            T softplus = 0, sigmoid = 0;
            if (has(i, j)) softplus_sigmoid(scale * scores(i, j, f(a, b)) + shift, softplus, sigmoid);
            f(a, b) = sigmoid * upstream;
            sums[0] += softplus;
            sums[1] += f(a, b);
          }
        },
        [&](int i, const T(&totals)[kSums]) {
          for (int k = 0; k < kSums; ++k) of_rows[((f.i0 + i) * kSums + k) * tiles_n + tile_n] = totals[k];
        });
    if (out.stored()) out.store(f);
  }
  template <class P>
  NEARFAR_DEVICE void apply_blocked(const Fragment<P>& f, int64_t tile_n) const {
    // Logits in units of log 2. log(1 + e^l) = max(l, 0) + log(1 + e), e = e^-|l|; a product of 1 + e_k, of which 1 is
    // left out so that small e count, takes the place of a logarithm each.
    const float scale = static_cast<float>(multiplier()) * cuda::kLog2E,
                shift = static_cast<float>(bias()) * cuda::kLog2E;
    const int64_t i0 = block.row + f.i0, j0 = block.column + f.j0;
    float upstream[P::kRows], above[P::kRows] = {}, product_less_1[P::kRows] = {}, sigmoids[P::kRows] = {};
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      const int64_t i = i0 + P::row(a);
      upstream[a] = i >= n ? 0.0f : static_cast<float>(weights ? weights[i] : weight);
    }
    with_hidden(
        i0 + P::kM <= n && j0 + P::kN <= m && !(matched && i0 == j0), [&](int i, int j) { return has(i0 + i, j0 + j); },
        [&](auto hides) {
          out.weigh(f, {scores.x_factor + i0}, {scores.y_factor + j0},
                    [&](const float* x, const float* y, float product, int a, int b) {
                      if (hides(a, b)) return 0.0f;
                      const float l = product * (scale * *x * *y) + shift, e = cuda::exp2_fast(-fabsf(l));
                      const float sigmoid = (l < 0 ? e : 1.0f) * cuda::reciprocal_fast(1 + e);
                      if (!(l < 0)) above[a] += l;
                      product_less_1[a] += e * (1 + product_less_1[a]);
                      sigmoids[a] += sigmoid;
                      return sigmoid * upstream[a];
                    });
        });
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      above[a] = above[a] / cuda::kLog2E + log1p(product_less_1[a]);
      sigmoids[a] *= upstream[a];
    }
    const auto place = [&](int i, int which) -> T& { return of_rows[((f.i0 + i) * kSums + which) * tiles_n + tile_n]; };
    place_rows<P>(above, [&](int i, float sum) { place(i, 0) = sum; });
    place_rows<P>(sigmoids, [&](int i, float sum) { place(i, 1) = sum; });
  }
};

/// The diagonal, which is where the sums of rows begin: softplus(-l_ii), and its slope -sigmoid(-l_ii) times the
/// upstream gradient; where nothing matches, 0. A warp a row.
template <class T>
struct Matches {
  Source<T> x, y;
  bool matched;
  Multiplier multiplier;
  Bias bias;
  const T* weights;
  T weight;
  double* sums;  // (n, 2)
  T* slopes;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= x.rows.n) return;
    const double l = matched ? multiplier() * warp_dot(x, i, y, i) + bias() : infinity<double>();
    if (cuda::lane_index() != 0) return;
    double softplus, sigmoid;
    softplus_sigmoid(-l, softplus, sigmoid);
    slopes[i] = static_cast<T>(-sigmoid * static_cast<double>(weights ? weights[i] : weight));
    sums[2 * i] = softplus;
    sums[2 * i + 1] = static_cast<double>(slopes[i]);
  }
};

/// Losses of rows, and both sums side by side.
template <class T>
struct SplitSums {
  const double* sums;
  int64_t n;
  T* loss;
  double *losses, *slopes;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    if (i >= n) return;
    losses[i] = sums[2 * i];
    slopes[i] = sums[2 * i + 1];
    loss[i] = static_cast<T>(losses[i]);
  }
};

template <class T, class E>
void run(cuda::Context& c, const SigmoidDevice<T>& p) {
  using Epilogue = SigmoidEpilogue<T>;
  const int64_t n = p.x.n;
  const Multiplier multiplier{{p.scale_at, p.scale}};
  const Bias bias{{p.bias_at, p.bias}};
  const T weight = static_cast<T>(p.weight);
  const Pairs<T, E> pairs(c, p.x, p.y, p.normalize, false, p.dx != nullptr, true);
  Strip<T, E> strip(c, pairs, false, p.dx != nullptr, p.dx, p.dy);
  if (p.dx) p.weights ? strip.fit(1, Numbers<T>{p.weights, n}) : strip.fit(fabs(p.weight));

  double* sums = c.take<double>(Epilogue::kSums * n);
  T* slopes = c.take<T>(n);
  c.launch_warps(
      n, Matches<T>{pairs.scores.x, pairs.scores.y, p.matched, multiplier, bias, p.weights, weight, sums, slopes});

  const StripShape shape = p.dx ? strip.shape : tile_blocks(c, pairs, Epilogue::kSums);
  T* of_rows = c.take<T>(shape.rows * Epilogue::kSums * tiles_of(shape));
  auto pass = [&](const Block& block, const Weights<T>& weights) {
    const TiledBlock<T, E> tiled(c, "sigmoid", pairs, block);
    launch_scores(c, tiled.plan, pairs, block,
                  Epilogue{pairs.scores, multiplier, bias, p.weights, weight, weights, block, n, p.y.n, tiled.tiles_n,
                           p.matched, of_rows});
    const int64_t lines = Epilogue::kSums * tiled.valid;
    c.launch_warps(lines, MergeSums<T>{of_rows, tiled.tiles_n, lines, sums + Epilogue::kSums * block.row});
  };
  if (p.dx) {
    strip.for_blocks([&](const Weights<T>& weights) {
      pass(weights.block, weights);
      strip.products(weights);
    });
  } else {
    for_tile_blocks(c, pairs, Epilogue::kSums, [&](const Block& block) { pass(block, Weights<T>{}); });
  }

  double *losses = c.take<double>(n), *row_slopes = c.take<double>(n);
  c.launch_threads(n, SplitSums<T>{sums, n, p.loss, losses, row_slopes});
  c.launch(1, StoreSum{{losses, n}, p.loss_total});
  if (!p.dx) return;
  c.launch(1, StoreSum{{row_slopes, n}, p.dbias_at});
  double* along = c.take<double>(n);
  FinishRows<T> step = finish_scaled<T>(multiplier, along);
  const Enter enter = p.matched ? Enter::own : Enter::none;
  step.terms[0] = {enter, slopes, pairs.scores.y, n, 0, 1};
  finish_rows(c, pairs.scores.x, p.dx, step);
  c.launch(1, ScaleSlope{{along, n}, multiplier, 1, p.dscale_at});
  if (!p.dy) return;
  step = finish_scaled<T>(multiplier, nullptr);
  step.terms[0] = {enter, slopes, pairs.scores.x, n, 0, 1};
  finish_rows(c, pairs.scores.y, p.dy, step);
}

}  // namespace

namespace cuda {
template <class T>
void sigmoid(Context& c, const SigmoidDevice<T>& p) {
  with_element<T>(p.x.dtype, false, [&](auto element) { run<T, decltype(element)>(c, p); });
}
}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(sigmoid, SigmoidDevice)
