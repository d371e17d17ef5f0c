// Supervised contrastive loss: softmaxes with a set of positives for every row (Khosla et al. 2020).
//
//   loss_i = log sum_{j != i} e^{s_ij} - 1/|P(i)| sum_{p in P(i)} s_ip        s = scale <x_i, x_j>
//
// Every tile leaves for each of its rows a partial log-sum-exp, the positives' number and the sum of their scores,
// merged in order. Then the same scores again become weights, a strip at a time: scores are symmetric, so the weights
// of a pair for both of its rows add to one matrix, and one product with it is the whole gradient, three in all.
// Positives are part of these weights: where a tight class cancels against the softmax, it does so before the product.
#include "cuda/loss.hpp"

namespace nearfar {
namespace {

using cuda::SupConDevice;

/// Which rows are positives of which: the views of one item, and items of one label, or what a mask of items says.
struct PositiveSets {
  const int64_t* labels;  // of items; null: none
  const uint8_t* mask;    // of pairs of items; null: none
  int64_t mask_row_stride, mask_col_stride, views;

  NEARFAR_DEVICE int64_t item(int64_t i) const {
    return views == 1 ? i : static_cast<uint32_t>(i) / static_cast<uint32_t>(views);
  }
  NEARFAR_DEVICE bool operator()(int64_t own, int64_t other) const {
    if (own == other) return true;
    if (labels) return labels[own] == labels[other];
    return mask && mask[own * mask_row_stride + other * mask_col_stride];
  }
};

/// Scaled scores, -inf where a row is its own column, and outside.
template <class T>
struct OtherScores {
  Scores<T> scores;
  Multiplier multiplier;
  PositiveSets positives;
  int64_t n;

  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, const Block& block) const {
    const T scale = static_cast<T>(multiplier());
    f.for_each([&](int64_t i, int64_t j, T& score) {
      i += block.row;
      j += block.column;
      score = i < n && j < n && i != j ? scale * scores(i, j, score) : -infinity<T>();
    });
  }
};

template <class T>
struct SupConEpilogue {
  static constexpr bool kDistances = false, kStores = false;
  static constexpr int kSums = 2;  // of a row of a tile: how many positives, the sum of their scores
  OtherScores<T> others;
  Block block;
  int64_t tiles_n;
  PartialSum<T>* of_rows;  // [row][tile_n]
  T* sums_of_rows;         // [row][which][tile_n]

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t tile_n, int64_t) const {
    others.apply(f, block);
    const PositiveSets& positives = others.positives;
    reduce_sums<P, kSums>(
        [&](int a, T(&sums)[kSums]) {
          const int64_t i = block.row + f.i(a);
          sums[0] = sums[1] = 0;
          NEARFAR_UNROLL
          for (int b = 0; b < P::kCols; ++b) {
            const int64_t j = block.column + f.j(b);
            if (i >= others.n || j >= others.n || i == j || !positives(positives.item(i), positives.item(j))) continue;
            sums[0] += 1;
            sums[1] += f(a, b);
          }
        },
        [&](int i, const T(&totals)[kSums]) {
          for (int k = 0; k < kSums; ++k) sums_of_rows[((f.i0 + i) * kSums + k) * tiles_n + tile_n] = totals[k];
        });
    reduce_lse<P, true>(f, [&](int i, const PartialSum<T>& sum) { of_rows[(f.i0 + i) * tiles_n + tile_n] = sum; });
  }
};

struct StartRows {
  int64_t n;
  LogSumExp* states;
  double* sums;
  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    if (i >= n) return;
    states[i] = LogSumExp();
    sums[2 * i] = sums[2 * i + 1] = 0;
  }
};

/// Losses. A row without a positive has none.
template <class T>
struct Losses {
  const LogSumExp* states;
  const double* sums;  // (n, 2)
  int64_t n;
  T* loss;
  double *losses, *anchor;  // anchor: 1 or 0

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    if (i >= n) return;
    const double count = sums[2 * i];
    anchor[i] = count > 0 ? 1 : 0;
    losses[i] = count > 0 ? states[i].value() - sums[2 * i + 1] / count : 0;
    loss[i] = static_cast<T>(losses[i]);
  }
};

/// Of rows: the normaliser, the upstream gradient (0 without a positive, or past the end) and its share for a positive.
/// What the normaliser is off by rounding, `weight` makes good.
template <class T>
struct FillRows {
  const LogSumExp* states;
  const double* sums;
  const T* upstream;         // null: 1
  const double* mean_count;  // divides it; null: 1
  int64_t n, padded;
  T *base, *weight, *share;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    if (i >= padded) return;
    base[i] = weight[i] = share[i] = 0;
    if (i >= n) return;
    const double lse = states[i].value(),
                 own = (upstream ? static_cast<double>(upstream[i]) : 1) / (mean_count ? *mean_count : 1);
    base[i] = static_cast<T>(lse);  // also without a positive: no exponential may overflow
    if (!(sums[2 * i] > 0)) return;
    weight[i] = static_cast<T>(own * exp(static_cast<double>(base[i]) - lse));
    share[i] = static_cast<T>(own / sums[2 * i]);
  }
};

template <class T>
struct SupConWeightEpilogue {
  static constexpr bool kDistances = false, kStores = true;
  OtherScores<T> others;
  const T *base, *weight, *share;
  Weights<T> out;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    others.apply(f, out.block);
    const PositiveSets& positives = others.positives;
    f.for_each([&](int64_t i, int64_t j, T& score) {
      if (score == -infinity<T>()) {
        score = 0;
        return;
      }
      const int64_t own = out.block.row + i, other = out.block.column + j;
      const int64_t own_item = positives.item(own), other_item = positives.item(other);
      T w = weight[own] * exp_flush(score - base[own]) + weight[other] * exp_flush(score - base[other]);
      if (positives(own_item, other_item)) w -= share[own];
      if (positives(other_item, own_item)) w -= share[other];
      score = w;
    });
    out.store(f);
  }
};

template <class T, class E>
void run(cuda::Context& c, const SupConDevice<T>& p) {
  using Epilogue = SupConEpilogue<T>;
  const int64_t n = p.x.n;
  constexpr int64_t kNumbers = 4;  // of a row of a tile
  const Pairs<T, E> pairs(c, p.x, p.x, p.normalize, false, p.dx != nullptr, true);
  const PositiveSets positives{p.labels, p.positives.mask, p.positives.mask_row_stride, p.positives.mask_col_stride,
                               p.positives.views};
  const OtherScores<T> others{pairs.scores, {{p.scale_at, p.scale}}, positives, n};

  LogSumExp* states = c.take<LogSumExp>(n);
  double* sums = c.take<double>(Epilogue::kSums * n);
  c.launch_threads(n, StartRows{n, states, sums});
  const StripShape shape = tile_blocks(c, pairs, kNumbers);
  PartialSum<T>* of_rows = c.take<PartialSum<T>>(shape.rows * tiles_of(shape));
  T* sums_of_rows = c.take<T>(shape.rows * Epilogue::kSums * tiles_of(shape));
  for_tile_blocks(c, pairs, kNumbers, [&](const Block& block) {
    const TiledBlock<T, E> tiled(c, "softmax and positives", pairs, block);
    launch_scores(c, tiled.plan, pairs, block, Epilogue{others, block, tiled.tiles_n, of_rows, sums_of_rows});
    c.launch_warps(tiled.valid, MergeLogSumExps<T>{of_rows, tiled.tiles_n, tiled.valid, 1, 1, states + block.row});
    const int64_t lines = Epilogue::kSums * tiled.valid;
    c.launch_warps(lines, MergeSums<T>{sums_of_rows, tiled.tiles_n, lines, sums + Epilogue::kSums * block.row});
  });
  double *losses = c.take<double>(n), *anchor = c.take<double>(n);
  c.launch_threads(n, Losses<T>{states, sums, n, p.loss, losses, anchor});
  c.launch(1, StoreSum{{losses, n}, p.loss_total});
  c.launch(1, StoreSum{{anchor, n}, p.anchors_at});
  if (!p.dx) return;

  const int64_t padded = pairs.x.padded;
  T *base = c.take<T>(padded), *weight = c.take<T>(padded), *share = c.take<T>(padded);
  c.launch_threads(padded, FillRows<T>{states, sums, p.weights, p.weight_of_mean ? p.anchors_at : nullptr, n, padded,
                                       base, weight, share});
  Strip<T, E> strip(c, pairs, false, true, p.dx, nullptr);
  strip.for_blocks([&](const Weights<T>& weights) {
    const Plan plan = plan_scores(c, "weights of softmax and positives", pairs, weights.block);
    launch_scores(c, plan, pairs, weights.block, SupConWeightEpilogue<T>{others, base, weight, share, weights});
    strip.products(weights);
  });
  double* along = c.take<double>(n);
  finish_rows(c, pairs.scores.x, p.dx, finish_scaled<T>(others.multiplier, along));
  c.launch(1, ScaleSlope{{along, n}, others.multiplier, 2, p.dscale_at});
}

}  // namespace

namespace cuda {
template <class T>
void sup_con(Context& c, const SupConDevice<T>& p) {
  with_element<T>(p.x.dtype, false, [&](auto element) { run<T, decltype(element)>(c, p); });
}
}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(sup_con, SupConDevice)
