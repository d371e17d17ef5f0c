// Supervised contrastive loss: softmaxes with a set of positives for every row (Khosla et al. 2020).
//
//   loss_i = log sum_{j != i} e^{s_ij} - 1/|P(i)| sum_{p in P(i)} s_ip        s = scale <x_i, x_j>
//
// Every tile leaves for each of its rows a partial log-sum-exp, the positives' number and the sum of their scores,
// merged in order. Then the same scores again become weights, a strip at a time: scores are symmetric, so the weights
// of a pair for both of its rows add to one matrix, and one product with it is the whole gradient, three in all.
// Positives are part of these weights: where a tight class cancels against the softmax, it does so before the product.
#include "cuda/softmax.hpp"

namespace nearfar {
namespace {

using cuda::SupConDevice;

/// Which rows are positives of which: the views of one item, and items of one label, or what a mask of items says.
struct PositiveSets {
  const int64_t* classes;  // of rows, positives are of one class; null: by the mask
  const float* narrow;     // the lower halves of classes, as bits, of whole tiles
  const uint32_t* wide;    // of tiles: do classes have more than that?
  const uint8_t* mask;     // of pairs of items
  int64_t mask_row_stride, mask_col_stride, views, n;

  NEARFAR_DEVICE int64_t item(int64_t i) const {
    return views == 1 ? i : static_cast<uint32_t>(i) / static_cast<uint32_t>(views);
  }
  NEARFAR_DEVICE bool operator()(int64_t i, int64_t j) const {
    if (i >= n || j >= n || i == j) return false;
    if (classes) return classes[i] == classes[j];
    const int64_t own = item(i), other = item(j);
    return own == other || mask[own * mask_row_stride + other * mask_col_stride];
  }
  /// Do `narrow` of a whole tile of other rows than columns say which pairs are positives?
  NEARFAR_DEVICE bool by_narrow(int64_t i0, int64_t j0) const {
    return classes && (wide[i0 / kPadRows] | wide[j0 / kPadRows]) == 0;
  }
};

/// A warp for 128 rows.
struct FillClasses {
  PositiveSets sets;
  const int64_t* labels;  // of items; null: none
  int64_t padded;
  int64_t* classes;
  float* narrow;
  uint32_t* wide;
  NEARFAR_DEVICE void operator()() const {
    const int64_t tile = cuda::global_warp();
    if (tile * kPadRows >= padded) return;
    bool more = false;
    for (int64_t i = tile * kPadRows + cuda::lane_index(); i < (tile + 1) * kPadRows; i += cuda::kWarp) {
      const int64_t own = i >= sets.n ? 0 : labels ? labels[sets.item(i)] : sets.item(i);
      const int32_t lower = static_cast<int32_t>(own);
      more |= lower != own;
      if (i < sets.n) classes[i] = own;
      memcpy(narrow + i, &lower, sizeof(lower));
    }
    more = cuda::ballot(more);
    if (cuda::lane_index() == 0) wide[tile] = more;
  }
};

/// body(hides, positive): does a pair not count in the denominator, and is it positive, by the classes of its rows and
/// its place? In the code twice, so that most tiles have no bits for either.
template <class P, class T, class Body>
NEARFAR_DEVICE void with_positives(const Fragment<P>& f, const Block& block, const MaskedScores<T>& masked,
                                   const PositiveSets& positives, Body body) {
  const int64_t i0 = block.row + f.i0, j0 = block.column + f.j0;
  if (masked.whole(i0, j0) && positives.by_narrow(i0, j0))
    return body([](int, int) { return false; },
                [](float x, float y, int, int) { return cuda::bits_of(x) == cuda::bits_of(y); });
  uint32_t hidden[P::kRows], no_positive[P::kRows];
  hide_pairs([&](int i, int j) { return masked.has(i0 + i, j0 + j); }, hidden);
  hide_pairs([&](int i, int j) { return positives(i0 + i, j0 + j); }, no_positive);
  body([&](int a, int b) -> bool { return hidden[a] >> b & 1; },
       [&](float, float, int a, int b) -> bool { return ~no_positive[a] >> b & 1; });
}

template <class T>
struct SupConEpilogue {
  static constexpr bool kDistances = false, kBlocked = true;
  static constexpr int kSums = 2;  // of a row of a tile: how many positives, the sum of their scores
  MaskedScores<T> masked;
  PositiveSets positives;
  Block block;
  int64_t tiles_n;
  PartialSum<T>* of_rows;  // [row][tile_n]
  T* sums_of_rows;         // [row][which][tile_n]

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t tile_n, int64_t) const {
    if constexpr (is_blocked<P>) return apply_blocked(f, tile_n);
    masked.apply(f, block);
    reduce_sums<P, kSums>(
        [&](int a, T(&sums)[kSums]) {
          sums[0] = sums[1] = 0;
          NEARFAR_UNROLL
          for (int b = 0; b < P::kCols; ++b) {
            if (!positives(block.row + f.i(a), block.column + f.j(b))) continue;
            sums[0] += 1;
            sums[1] += f(a, b);
          }
        },
        [&](int i, const T(&totals)[kSums]) {
          for (int k = 0; k < kSums; ++k) place(f.i0 + i, k, tile_n) = totals[k];
        });
    reduce_lse<P, true>(f, [&](int i, const PartialSum<T>& sum) { of_rows[(f.i0 + i) * tiles_n + tile_n] = sum; });
  }

 private:
  NEARFAR_DEVICE T& place(int64_t i, int which, int64_t tile_n) const {
    return sums_of_rows[(i * kSums + which) * tiles_n + tile_n];
  }
  template <class P>
  NEARFAR_DEVICE void apply_blocked(const Fragment<P>& f, int64_t tile_n) const {
    const int64_t i0 = block.row + f.i0, j0 = block.column + f.j0;
    float sums[P::kRows] = {}, counts[P::kRows] = {};
    if (masked.bounded()) {
      const float scale = static_cast<float>(masked.multiplier()), scale_of_2 = scale * cuda::kLog2E;
      const float* classes = positives.classes ? positives.narrow : masked.scores.x_factor;
      float totals[P::kRows] = {};
      with_positives(f, block, masked, positives, [&](auto hides, auto positive) {
        for_each_pair(f, {masked.x_of(f, block), classes + i0}, {masked.y_of(f, block), classes + j0},
                      [&](const float* x, const float* y, float product, int a, int b) {
                        const float below = product * (scale_of_2 * x[0] * y[0]) - scale_of_2;
                        totals[a] += hides(a, b) ? 0.0f : cuda::exp2_fast(below);
                        if (positive(x[1], y[1], a, b)) sums[a] += below, counts[a] += 1;
                        return product;
                      });
      });
      NEARFAR_UNROLL
      for (int a = 0; a < P::kRows; ++a) sums[a] = sums[a] / cuda::kLog2E + counts[a] * scale;
      place_rows<P>(totals, [&](int i, float sum) { of_rows[(f.i0 + i) * tiles_n + tile_n] = {scale, sum}; });
    } else {
      masked.apply(f, block);
      uint32_t no_positive[P::kRows];
      hide_pairs([&](int i, int j) { return positives(i0 + i, j0 + j); }, no_positive);
      NEARFAR_UNROLL
      for (int a = 0; a < P::kRows; ++a) {
        counts[a] = static_cast<float>(P::kCols - cuda::count_bits(no_positive[a]));
        NEARFAR_UNROLL
        for (int b = 0; b < P::kCols; ++b)
          if (!(no_positive[a] >> b & 1)) sums[a] += f(a, b);
      }
      reduce_lse<P, true>(f, [&](int i, const PartialSum<T>& sum) { of_rows[(f.i0 + i) * tiles_n + tile_n] = sum; });
    }
    place_rows<P>(counts, [&](int i, float count) { place(f.i0 + i, 0, tile_n) = count; });
    place_rows<P>(sums, [&](int i, float sum) { place(f.i0 + i, 1, tile_n) = sum; });
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

/// Of rows: the base of exponentials, the upstream gradient (0 without a positive, or past the end), the same over the
/// sum of exponentials, and its share for a positive.
template <class T>
struct FillRows {
  const LogSumExp* states;
  const double* sums;
  const T* upstream;         // null: 1
  const double* mean_count;  // divides it; null: 1
  int64_t n, padded;
  Multiplier multiplier;
  bool unit;
  T *base, *own, *weight, *share;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    if (i >= padded) return;
    base[i] = own[i] = weight[i] = share[i] = 0;
    if (i >= n) return;
    const double lse = states[i].value(), scale = multiplier(),
                 factor = (upstream ? static_cast<double>(upstream[i]) : 1) / (mean_count ? *mean_count : 1);
    // Also without a positive: no exponential may overflow. What the base is off by rounding, `weight` makes good.
    base[i] = static_cast<T>(MaskedScores<T>::bounded_by(unit, scale) ? scale : lse);
    if (!(sums[2 * i] > 0)) return;
    own[i] = static_cast<T>(factor);
    weight[i] = static_cast<T>(factor * exp(static_cast<double>(base[i]) - lse));
    share[i] = static_cast<T>(factor / sums[2 * i]);
  }
};

/// Weights of pairs, less what a positive adds to them.
template <class T>
struct SupConWeightEpilogue {
  static constexpr bool kDistances = false, kBlocked = true;
  WeighPairs<T> weigh;
  PositiveSets positives;
  const T* share;
  Weights<T> out;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    const Block& b = out.block;
    if constexpr (is_blocked<P>)
      if (weigh.masked.bounded() && positives.classes) return store_bounded(f);
    weigh.apply(f, b);
    if constexpr (is_blocked<P>) {
      if (positives.classes) {
        subtract_share<true, true>(f);
      } else {  // a mask need not be symmetric
        subtract_share<true, false>(f);
        subtract_share<false, true>(f);
      }
      return out.store(f);
    }
    f.for_each([&](int64_t i, int64_t j, T& value) {
      i += b.row;
      j += b.column;
      if (positives(i, j)) value -= share[i];
      if (positives(j, i)) value -= share[j];
    });
    out.store(f);
  }

 private:
  template <class P>
  NEARFAR_DEVICE void store_bounded(const Fragment<P>& f) const {
    const MaskedScores<T>& masked = weigh.masked;
    const int64_t i0 = out.block.row + f.i0, j0 = out.block.column + f.j0;
    const float scale = static_cast<float>(masked.multiplier()) * cuda::kLog2E;
    with_positives(f, out.block, masked, positives, [&](auto hides, auto positive) {
      out.weigh(f, {masked.x_of(f, out.block), weigh.weight.row_weight + i0, share + i0, positives.narrow + i0},
                {masked.y_of(f, out.block), weigh.weight.column_weight + j0, share + j0, positives.narrow + j0},
                [=](const float* x, const float* y, float product, int a, int b) {
                  const float e = hides(a, b) ? 0.0f : cuda::exp2_fast(product * (scale * x[0] * y[0]) - scale);
                  const float w = e * (x[1] + y[1]);
                  return positive(x[3], y[3], a, b) ? w - (x[2] + y[2]) : w;
                });
    });
  }
  template <bool OF_ROW, bool OF_COLUMN, class P>
  NEARFAR_DEVICE void subtract_share(const Fragment<P>& f) const {
    const int64_t i0 = out.block.row + f.i0, j0 = out.block.column + f.j0;
    uint32_t no_positive[P::kRows];
    hide_pairs([&](int i, int j) { return OF_ROW ? positives(i0 + i, j0 + j) : positives(j0 + j, i0 + i); },
               no_positive);
    for_each_pair(f, {share + i0}, {share + j0}, [&](const float* own, const float* other, float value, int a, int b) {
      const float both = (OF_ROW ? *own : 0.0f) + (OF_COLUMN ? *other : 0.0f);
      return no_positive[a] >> b & 1 ? value : value - both;
    });
  }
};

template <class T, class E>
void run(cuda::Context& c, const SupConDevice<T>& p) {
  using Epilogue = SupConEpilogue<T>;
  const int64_t n = p.x.n;
  constexpr int64_t kNumbers = 4;  // of a row of a tile
  const Pairs<T, E> pairs(c, p.x, p.x, p.normalize, false, p.dx != nullptr, true);
  const bool by_class = p.labels || !p.positives.mask;
  const int64_t padded = pairs.x.padded;
  int64_t* classes = by_class ? c.take<int64_t>(n) : nullptr;
  float* narrow = by_class ? c.take<float>(padded) : nullptr;
  uint32_t* wide = by_class ? c.take<uint32_t>(ceil_div(padded, kPadRows)) : nullptr;
  const PositiveSets positives{
      classes,           narrow, wide, p.positives.mask, p.positives.mask_row_stride, p.positives.mask_col_stride,
      p.positives.views, n};
  if (by_class)
    c.launch_warps(ceil_div(padded, kPadRows), FillClasses{positives, p.labels, padded, classes, narrow, wide});
  const bool unit = p.normalize && pairs.blocked();
  const Multiplier multiplier{{p.scale_at, p.scale}};
  const MaskedScores<T> masked{pairs.scores, multiplier, n, n, -1, true, nullptr, nullptr, 0, unit};

  LogSumExp* states = c.take<LogSumExp>(n);
  double* sums = c.take<double>(Epilogue::kSums * n);
  c.launch_threads(n, StartRows{n, states, sums});
  const StripShape shape = tile_blocks(c, pairs, kNumbers);
  PartialSum<T>* of_rows = c.take<PartialSum<T>>(shape.rows * tiles_of(shape));
  T* sums_of_rows = c.take<T>(shape.rows * Epilogue::kSums * tiles_of(shape));
  for_tile_blocks(c, pairs, kNumbers, [&](const Block& block) {
    const TiledBlock<T, E> tiled(c, "softmax and positives", pairs, block);
    launch_scores(c, tiled.plan, pairs, block,
                  Epilogue{masked, positives, block, tiled.tiles_n, of_rows, sums_of_rows});
    c.launch_warps(tiled.valid, MergeLogSumExps<T>{of_rows, tiled.tiles_n, tiled.valid, 1, 1, states + block.row});
    const int64_t lines = Epilogue::kSums * tiled.valid;
    c.launch_warps(lines, MergeSums<T>{sums_of_rows, tiled.tiles_n, lines, sums + Epilogue::kSums * block.row});
  });
  double *losses = c.take<double>(n), *anchor = c.take<double>(n);
  c.launch_threads(n, Losses<T>{states, sums, n, p.loss, losses, anchor});
  c.launch(1, StoreSum{{losses, n}, p.loss_total});
  c.launch(1, StoreSum{{anchor, n}, p.anchors_at});
  if (!p.dx) return;

  T *base = c.take<T>(padded), *own = c.take<T>(padded), *weight = c.take<T>(padded), *share = c.take<T>(padded);
  c.launch_threads(padded, FillRows<T>{states, sums, p.weights, p.weight_of_mean ? p.anchors_at : nullptr, n, padded,
                                       multiplier, unit, base, own, weight, share});
  Strip<T, E> strip(c, pairs, false, true, p.dx, nullptr);
  strip.fit(2, Numbers<T>{own, padded});
  strip.for_blocks([&](const Weights<T>& weights) {
    const Plan plan = plan_scores(c, "weights of softmax and positives", pairs, weights.block);
    launch_scores(c, plan, pairs, weights.block,
                  SupConWeightEpilogue<T>{{masked, {base, weight, base, weight}}, positives, share, weights});
    strip.products(weights);
  });
  double* along = c.take<double>(n);
  finish_rows(c, pairs.scores.x, p.dx, finish_scaled<T>(multiplier, along));
  c.launch(1, ScaleSlope{{along, n}, multiplier, 2, p.dscale_at});
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
