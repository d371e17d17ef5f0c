// Log-sum-exps over the columns of a row's own label and over all others: what is computed, and for which losses, is
// said in cpu/ops/labelled_lse.cpp.
//
// Two calls. Values: every tile leaves a partial state for each sum of its rows, merged in order. Gradients, once the
// upstream gradient of the sums is known: the same scores again become weights, a strip at a time. Where y is x scores
// are symmetric, so that the weights of a pair as a row and as a column add to one matrix: one product with it is the
// whole gradient, two in all. With a y of its own: three.
#include "cuda/loss.hpp"

namespace nearfar {
namespace {

using cuda::LabelledLseDevice;

template <class T>
struct Map {
  T sign, q, r, shift;
  Map(const ScoreMap& map)
      : sign(static_cast<T>(map.sign)),
        q(static_cast<T>(map.q)),
        r(static_cast<T>(map.r)),
        shift(static_cast<T>(map.shift)) {}
};

/// The bit of an accumulator.
template <class P>
NEARFAR_DEVICE constexpr uint64_t bit_of(int a, int b) {
  static_assert(P::kRows * P::kCols <= 64, "one bit for every accumulator");
  return uint64_t(1) << (a * P::kCols + b);
}

/// What both calls know of pairs.
template <class T>
struct LabelledPairs {
  Scores<T> scores;
  Multiplier multiplier;
  int64_t n, m;
  bool same;                           // y is x: a row is not its own column
  const int64_t *labels_x, *labels_y;  // labels_x null: the label of a row is its number, and others do not exist
  Map<T> own, other;

  NEARFAR_DEVICE bool has(int64_t i, int64_t j) const { return i < n && j < m && !(same && i == j); }
  NEARFAR_DEVICE bool alike(int64_t i, int64_t j) const { return (labels_x ? labels_x[i] : i) == labels_y[j]; }
  /// A label that no row has is as bad as a column that is NaN; it cannot be refused without waiting for it.
  NEARFAR_DEVICE bool known(int64_t j) const { return labels_x || (labels_y[j] >= 0 && labels_y[j] < n); }

  NEARFAR_DEVICE T slope(T s, bool alike) const {
    const Map<T>& map = alike ? own : other;
    return map.sign * largest(T(0), map.q * s + map.r);
  }
  NEARFAR_DEVICE T logit(T s, T slope, bool alike) const { return slope * (s - (alike ? own.shift : other.shift)); }

  /// Products become scores. A bit for each pair that is there, and one for each that is of the row's own label.
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, const Block& block, uint64_t& there, uint64_t& own_label) const {
    const T scale = static_cast<T>(multiplier());
    if constexpr (is_blocked<P>) return apply_blocked(f, block, scale, there, own_label);
    there = own_label = 0;
    NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b) {
      const int64_t j = block.column + f.j(b);
      const bool good = j < m && known(j);
      NEARFAR_UNROLL
      for (int a = 0; a < P::kRows; ++a) {
        const int64_t i = block.row + f.i(a);
        if (!has(i, j)) continue;
        there |= bit_of<P>(a, b);
        if (alike(i, j)) own_label |= bit_of<P>(a, b);
        f(a, b) = good ? scale * scores(i, j, f(a, b)) : not_a_number<T>();
      }
    }
  }

 private:
  template <class P>
  NEARFAR_DEVICE void apply_blocked(const Fragment<P>& f, const Block& block, float scale, uint64_t& there,
                                    uint64_t& own_label) const {
    const int64_t i0 = block.row + f.i0, j0 = block.column + f.j0;
    const bool whole = i0 + P::kM <= n && j0 + P::kN <= m && !(same && i0 == j0);
    uint32_t hidden[P::kRows] = {};
    const auto bits = [&] { return uint64_t(~hidden[1]) << P::kCols | uint32_t(~hidden[0]); };
    if (!whole) hide_pairs([&](int i, int j) { return has(i0 + i, j0 + j); }, hidden);
    there = bits();
    hide_pairs([&](int i, int j) { return has(i0 + i, j0 + j) && alike(i0 + i, j0 + j); }, hidden);
    own_label = bits();
    hidden[0] = hidden[1] = 0;
    if (!labels_x) hide_pairs([&](int, int j) { return j0 + j >= m || known(j0 + j); }, hidden);
    for_each_pair(f, {scores.x_factor + i0}, {scores.y_factor + j0},
                  [&](const float* x, const float* y, float product, int a, int b) {
                    return hidden[a] >> b & 1 ? not_a_number<float>() : product * (scale * *x * *y);
                  });
  }
};

/// Of a row in a tile: K sums of exponentials, above the largest logits of its own label and of the others.
template <class T, int K>
struct LabelledLseEpilogue {
  static constexpr bool kDistances = false, kBlocked = true;
  LabelledPairs<T> pairs;
  T power;
  Block block;
  int64_t tiles_n;
  PartialSum<T>* of_rows;  // [row][which][tile_n]

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t tile_n, int64_t) const {
    uint64_t there, own_label;
    pairs.apply(f, block, there, own_label);
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b) {
      const bool alike = own_label & bit_of<P>(a, b);
      if (there & bit_of<P>(a, b)) f(a, b) = pairs.logit(f(a, b), pairs.slope(f(a, b), alike), alike);
    }
    T bases[P::kRows][2];
    find_bases(f, there, own_label, bases);
    auto place_of = [&](int i, int k) -> PartialSum<T>& { return of_rows[((f.i0 + i) * K + k) * tiles_n + tile_n]; };
    if (first_of_row<P>() && P::warp_n() == 0) {
      NEARFAR_UNROLL
      for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
      for (int k = 0; k < K; ++k) place_of(P::row(a), k).m = bases[a][k ? 1 : 0];
    }
    reduce_sums<P, K>(
        [&](int a, T(&sums)[K]) {
          const T own_base = bases[a][0], other_base = bases[a][1];
          NEARFAR_UNROLL
          for (int k = 0; k < K; ++k) sums[k] = 0;
          NEARFAR_UNROLL
          for (int b = 0; b < P::kCols; ++b) {
            if (!(there & bit_of<P>(a, b))) continue;
            const bool alike = own_label & bit_of<P>(a, b);
            const T above = f(a, b) - (alike ? own_base : other_base), e = exp_flush(above);
            sums[0] += alike ? e : T(0);
            sums[1] += alike ? T(0) : e;
            if constexpr (K == 3) sums[2] += alike ? T(0) : exp_flush(power * above);
          }
        },
        [&](int i, const T(&totals)[K]) {
          for (int k = 0; k < K; ++k) place_of(i, k).s = totals[k];
        });
  }

  /// The largest logits of the tile's rows, 0 where there is none.
  template <class P>
  NEARFAR_DEVICE void find_bases(const Fragment<P>& f, uint64_t there, uint64_t own_label,
                                 T (&bases)[P::kRows][2]) const {
    RowParts<P, K>& parts = row_parts<P, K>();
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      T top[2] = {-infinity<T>(), -infinity<T>()};
      NEARFAR_UNROLL
      for (int b = 0; b < P::kCols; ++b) {
        if (!(there & bit_of<P>(a, b))) continue;
        const bool alike = own_label & bit_of<P>(a, b);
        top[0] = alike ? largest(top[0], f(a, b)) : top[0];
        top[1] = alike ? top[1] : largest(top[1], f(a, b));
      }
      NEARFAR_UNROLL
      for (int k = 0; k < 2; ++k) {
        NEARFAR_UNROLL
        for (int mask = 1; mask < P::kRowLanes; mask *= 2) top[k] = largest(top[k], cuda::shuffle_xor(top[k], mask));
        if (first_of_row<P>()) parts.of[P::warp_n()][k][P::row(a)] = top[k];
      }
    }
    cuda::sync_block();
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int k = 0; k < 2; ++k) {
      T top = -infinity<T>();
      for (int warp = 0; warp < P::kWarpsN; ++warp) top = largest(top, parts.of[warp][k][P::row(a)]);
      bases[a][k] = top == -infinity<T>() ? T(0) : top;
    }
    cuda::sync_block();
  }
};

/// Bases and weights of the sums of rows, [k][row]. An empty sum has no terms to weigh. What a base is off its
/// normaliser by rounding, its weight makes good.
template <class T>
struct FillTerms {
  const double *lse, *grad;  // (n, terms)
  int64_t n, padded;
  int terms;
  T *base, *weight;
  NEARFAR_DEVICE void operator()() const {
    const int64_t at = cuda::global_thread(), k = at / padded, i = at % padded;
    if (k >= terms) return;
    const double own = i < n ? lse[i * terms + k] : -infinity<double>();
    const bool empty = own == -infinity<double>();
    base[at] = empty ? T(0) : static_cast<T>(own);
    weight[at] = empty ? T(0) : static_cast<T>(grad[i * terms + k] * exp(static_cast<double>(base[at]) - own));
  }
};

/// w_ij = dl_ij/ds sum_k g_ik e^{l_ijk - lse_ik}, and the same of columns where y is x.
template <class T, int K>
struct LabelledWeightEpilogue {
  static constexpr bool kDistances = false, kBlocked = true;
  LabelledPairs<T> pairs;
  T power;
  const T *base, *weight;  // [k][row], `padded` rows
  int64_t padded;
  Weights<T> out;

  /// Bases and weights of a row, and what they make of a pair.
  struct Side {
    T base[K], weight[K];
    NEARFAR_DEVICE T operator()(T logit, T power, bool alike) const {
      const int k = alike ? 0 : 1;
      const T w = (k ? weight[1] : weight[0]) * exp_flush(logit - (k ? base[1] : base[0]));
      if constexpr (K == 2) return w;
      return k ? w + power * weight[2] * exp_flush(power * logit - base[2]) : w;
    }
  };
  NEARFAR_DEVICE Side side(int64_t i) const {
    Side out;
    NEARFAR_UNROLL
    for (int k = 0; k < K; ++k) out.base[k] = base[k * padded + i], out.weight[k] = weight[k * padded + i];
    return out;
  }
  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    uint64_t there, own_label;
    pairs.apply(f, out.block, there, own_label);
    Side rows[P::kRows];
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) rows[a] = side(out.block.row + f.i(a));
    NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b) {
      const Side column = side(pairs.same ? out.block.column + f.j(b) : 0);
      NEARFAR_UNROLL
      for (int a = 0; a < P::kRows; ++a) {
        const uint64_t bit = bit_of<P>(a, b);
        const bool alike = own_label & bit;
        const T slope = pairs.slope(f(a, b), alike), logit = pairs.logit(f(a, b), slope, alike);
        T w = rows[a](logit, power, alike);
        if (pairs.same) w += column(logit, power, alike);
        f(a, b) = there & bit ? w * slope : T(0);
      }
    }
    out.store(f);
  }
};

/// No slope of a logit is further from 0, of unit rows or a map that is linear.
template <class T>
double largest_slope(const LabelledLseDevice<T>& p) {
  double most = 0;
  for (const ScoreMap& map : p.maps) {
    const double rise = map.q == 0 ? 0 : fabs(map.q) * p.scale;  // the scale may be on the device
    most = fmax(most, fabs(map.sign) * (rise + fabs(map.r)));
  }
  return most;
}
/// Is that known here?
template <class T>
bool knows_slopes(const LabelledLseDevice<T>& p) {
  const bool linear = p.maps[0].q == 0 && p.maps[1].q == 0;
  return linear || (p.normalize && !p.scale_at);
}

template <class T, class E, int K>
void values(cuda::Context& c, const LabelledLseDevice<T>& p, const Pairs<T, E>& pairs, const LabelledPairs<T>& known) {
  const int64_t states_count = K * p.x.n;
  constexpr int64_t kNumbers = 2 * K;  // of a row of a tile
  LogSumExp* states = c.take<LogSumExp>(states_count);
  c.launch_threads(states_count, StartStates{states_count, states});
  const StripShape shape = tile_blocks(c, pairs, kNumbers);
  PartialSum<T>* of_rows = c.take<PartialSum<T>>(shape.rows * K * tiles_of(shape));
  const T power = static_cast<T>(p.power);
  for_tile_blocks(c, pairs, kNumbers, [&](const Block& block) {
    const TiledBlock<T, E> tiled(c, "log-sum-exps by label", pairs, block);
    launch_scores(c, tiled.plan, pairs, block, LabelledLseEpilogue<T, K>{known, power, block, tiled.tiles_n, of_rows});
    const int64_t lines = K * tiled.valid;
    c.launch_warps(lines, MergeLogSumExps<T>{of_rows, tiled.tiles_n, lines, K, static_cast<double>(power),
                                             states + K * block.row});
  });
  c.launch_threads(states_count, StoreStates{states_count, states, p.lse});
}

template <class T, class E, int K>
void gradients(cuda::Context& c, const LabelledLseDevice<T>& p, const Pairs<T, E>& pairs,
               const LabelledPairs<T>& known) {
  const int64_t n = p.x.n, padded = pairs.x.padded;
  Strip<T, E> strip(c, pairs, false, true, p.dx, p.same ? nullptr : p.dy);
  T *base = c.take<T>(K * padded), *weight = c.take<T>(K * padded);
  c.launch_threads(K * padded, FillTerms<T>{p.lse, p.grad, n, padded, K, base, weight});
  // As a row and as a column; with the third sum.
  strip.fit(2 * (K == 3 ? 1 + p.power : 1) * largest_slope(p), Numbers<T>{weight, K * padded});
  strip.for_blocks([&](const Weights<T>& weights) {
    const Plan plan = plan_scores(c, "weights by label", pairs, weights.block);
    launch_scores(c, plan, pairs, weights.block,
                  LabelledWeightEpilogue<T, K>{known, static_cast<T>(p.power), base, weight, padded, weights});
    strip.products(weights);
  });
  double* along = c.take<double>(n);
  finish_rows(c, pairs.scores.x, p.dx, finish_scaled<T>(known.multiplier, along));
  c.launch(1, ScaleSlope{{along, n}, known.multiplier, p.same ? 2.0 : 1.0, p.dscale_at});
  if (!p.same) finish_rows(c, pairs.scores.y, p.dy, finish_scaled<T>(known.multiplier, nullptr));
}

template <class T, class E, int K>
void run(cuda::Context& c, const LabelledLseDevice<T>& p) {
  const bool blocked = !std::is_same_v<E, F16> || knows_slopes(p);
  const Pairs<T, E> pairs(c, p.x, p.y, p.normalize, false, p.dx != nullptr, blocked);
  const LabelledPairs<T> known{pairs.scores, {{p.scale_at, p.scale}}, p.x.n, p.y.n, p.same, p.ids_x, p.ids_y, p.maps[0],
                               p.maps[1]};
  p.dx ? gradients<T, E, K>(c, p, pairs, known) : values<T, E, K>(c, p, pairs, known);
}

}  // namespace

namespace cuda {
template <class T>
void labelled_lse(Context& c, const LabelledLseDevice<T>& p) {
  with_element<T>(p.x.dtype, false, [&](auto element) {
    using E = decltype(element);
    p.terms == 3 ? run<T, E, 3>(c, p) : run<T, E, 2>(c, p);
  });
}
}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(labelled_lse, LabelledLseDevice)
