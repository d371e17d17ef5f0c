// Gaussian potential: log sum_{i<j} exp(-t |x_i - x_j|^2) and its gradient (Wang & Isola 2020).
//
// The normaliser is one number, so the gradient needs no second look at the scores: weights are exp(-t r + t r_0) with
// a reference r_0, summed while they are made, and divided by their sum at the end. On the sphere r <= 4, so r_0 = 0
// will do unless t is large; else r_0 is the least distance, found by a pass of its own. All pairs i != j are taken, so
// that one product with the symmetric weights is the whole gradient.
#include "cuda/ops.hpp"
#include "cuda/strip.hpp"

namespace nearfar {
namespace {

using cuda::PotentialDevice;

/// Of every tile: the sum of e^{t (r_0 - r)}, or with `least` the least r. Weights are stored where there is a strip.
template <class T>
struct PotentialEpilogue {
  static constexpr bool kDistances = true, kBlocked = true;
  Scores<T> scores;
  Weights<T> strip;  // w null: not stored
  Block block;
  int64_t n, tiles_n;
  bool least;
  T t;
  const double* reference;  // null: 0
  double* of_tiles;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  NEARFAR_DEVICE bool inside(int64_t i, int64_t j) const {
    return block.row + i < n && block.column + j < n && block.row + i != block.column + j;
  }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t tile_m, int64_t tile_n, int64_t) const {
    if constexpr (is_blocked<P>) return apply_unit(f, tile_m, tile_n);
    const int64_t i0 = block.row + f.i0, j0 = block.column + f.j0;
    const uint64_t hidden =
        f.without(i0 + P::kM <= n && j0 + P::kN <= n && i0 != j0, [&](int64_t i, int64_t j) { return inside(i, j); });
    const uint64_t near = scores.apply(f, i0, j0, hidden);
    f.replace(hidden, infinity<T>());
    const T base = reference ? static_cast<T>(*reference) : T(0);
    double total = least ? infinity<double>() : 0;
    f.for_each([&](int64_t, int64_t, T& value) {
      if (!least) value = exp_flush((base - value) * t);
      total = least ? fmin(total, static_cast<double>(value)) : total + static_cast<double>(value);
    });
    if (strip.w) {
      strip.store(f);
      f.for_bits(near, [&](int a, int b) { strip.mark(i0 + P::row(a), j0 + P::col(b)); });
    }
    if (least) {
      total = -block_largest(-total);
    } else {
      total = block_sum(total);
    }
    if (cuda::thread_index() == 0) of_tiles[tile_m * tiles_n + tile_n] = total;
  }
  /// Rows of norm one, or zero: their factor says which.
  template <class P>
  NEARFAR_DEVICE void apply_unit(const Fragment<P>& f, int64_t tile_m, int64_t tile_n) const {
    const float slope = -cuda::kLog2E * static_cast<float>(t);
    const int64_t i0 = block.row + f.i0, j0 = block.column + f.j0;
    float sums[P::kRows] = {0, 0};
    with_hidden(
        i0 + P::kM <= n && j0 + P::kN <= n && i0 != j0, [&](int i, int j) { return inside(f.i0 + i, f.j0 + j); },
        [&](auto hides) {
          strip.weigh(f, {scores.x_factor + i0}, {scores.y_factor + j0},
                      [&](const float* x, const float* y, float product, int a, int b) {
                        const float squares = (*x == 0 ? 0.0f : slope) + (*y == 0 ? 0.0f : slope);
                        const float w =
                            hides(a, b) ? 0.0f : cuda::exp2_fast(product * (-2 * slope * *x * *y) + squares);
                        sums[a] += w;
                        return w;
                      });
        });
    const double total = block_sum(static_cast<double>(sums[0]) + static_cast<double>(sums[1]));
    if (cuda::thread_index() == 0) of_tiles[tile_m * tiles_n + tile_n] = total;
  }
};

/// What the tiles of a block have left joins what those before it have: there is no room for all tiles of many points.
struct JoinTiles {
  OrderedSum tiles;
  bool least, first;
  double* total;
  NEARFAR_DEVICE void operator()() const {
    const double before = first ? (least ? infinity<double>() : 0) : *total;
    double own = infinity<double>();
    if (least) {
      for (int64_t k = cuda::thread_index(); k < tiles.count; k += cuda::kThreads) own = fmin(own, tiles.values[k]);
      own = fmin(before, -block_largest(-own));
    } else {
      own = before + tiles();
    }
    if (cuda::thread_index() == 0) *total = own;
  }
};

struct FiniteOrZero {
  double* value;
  NEARFAR_DEVICE void operator()() const {
    if (cuda::global_thread() == 0 && !(*value < infinity<double>())) *value = 0;
  }
};

/// The log of half the sum, pairs having been counted twice; and what turns the products into the gradient.
struct FinishPotential {
  const double* sum;
  double t;
  const double* reference;
  double *log_sum, *slope;
  NEARFAR_DEVICE void operator()() const {
    const double total = *sum / 2;
    if (cuda::thread_index() != 0) return;
    *log_sum = log(total) - t * (reference ? static_cast<double>(*reference) : 0);
    if (slope) *slope = -2 * t / total;
  }
};

constexpr double kSafeExponent = 60;

/// Weights of float16 are from 2^12 on for near pairs, and must be normal numbers: 2^-14 is the smallest. The mean of
/// e^{-t r} is e^{-t r'} at least, r' the mean of r, which is 2 n / (n - 1) at most.
bool faint(double t, int64_t n) { return 2 * t * n > 18 * (n - 1); }

/// Packed 16-bit rows are unit rows in blocks. There |x - y|^2 is 2 - 2 <x, y>, and of the gradient sum_j w_ij (x_i -
/// x_j) the part along x_i is nothing to the row itself: -sum_j w_ij x_j is left, in which near pairs need no care.
template <class T, class E>
void run(cuda::Context& c, const PotentialDevice<T>& p) {
  constexpr bool kUnit = sizeof(E) == 2;
  const Pairs<T, E> pairs(c, p.x, p.x, p.normalize, !kUnit, p.dx != nullptr, kUnit);
  Strip<T, E> strip(c, pairs, false, p.dx != nullptr, p.dx, nullptr);
  strip.fit(1);
  // By strips also where nothing is stored: the partial sums are of one launch each.
  double* of_tiles = c.take<double>(ceil_div(strip.shape.rows, 64) * tiles_of(strip.shape));
  double *total = c.take<double>(1), *reference = nullptr, *slope = p.dx ? c.take<double>(1) : nullptr;

  auto pass = [&](bool least, bool store, double* out) {
    strip.for_blocks([&](Weights<T> weights) {
      const Block& b = weights.block;
      const Plan plan = plan_scores(c, "potential", pairs, b);
      const int64_t tiles_n = ceil_div(b.columns, plan.tile);
      if (store) strip.clear_near(weights);
      if (!store) weights.w = nullptr, weights.blocks.data = nullptr;
      launch_scores(c, plan, pairs, b,
                    PotentialEpilogue<T>{pairs.scores, weights, b, p.x.n, tiles_n, least, static_cast<T>(p.t),
                                         reference, of_tiles});
      const int64_t tiles = ceil_div(b.rows, plan.tile) * tiles_n;
      c.launch(1, JoinTiles{{of_tiles, tiles}, least, b.row + b.column == 0, out});
      if (store) strip.products(weights);
    });
  };

  if (!p.normalize || 4 * p.t > kSafeExponent) {
    double* least = c.take<double>(1);
    pass(true, false, least);
    c.launch_threads(1, FiniteOrZero{least});
    reference = least;
  }
  pass(false, p.dx != nullptr, total);
  c.launch(1, FinishPotential{total, p.t, reference, p.log_sum_at, slope});
  if (!p.dx) return;
  FinishRows<T> step{};
  step.scale = slope;
  step.multiply = kUnit ? -1 : 1;
  finish_rows(c, pairs.scores.x, p.dx, step);
}

}  // namespace

namespace cuda {
template <class T>
void potential(Context& c, const PotentialDevice<T>& p) {
  if constexpr (sizeof(T) == 4) {
    if (p.normalize && 4 * p.t <= kSafeExponent) {
      if (blocks_rows<BF16>(c) && p.x.dtype == DType::bf16) return run<T, BF16>(c, p);
      if (blocks_rows<F16>(c) && p.x.dtype == DType::f16 && !faint(p.t, p.x.n)) return run<T, F16>(c, p);
    }
  }
  run<T, T>(c, p);
}
}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(potential, PotentialDevice)
