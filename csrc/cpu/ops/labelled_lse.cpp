// Log-sum-exps over the columns of a row's own label and over all others, each of its own map of the scores.
//
//   lse_i0 = log sum_{label of j is that of i} e^{l_ij}      lse_i1 = log sum_{other labels} e^{l_ij}
//   lse_i2 = log sum_{other labels} e^{power l_ij}           (where asked for)
//   l_ij = slope(s_ij) (s_ij - shift),  slope(s) = sign max(q s + r, 0),  one set of constants for each of the two sums
//
// HCL, multi-similarity, circle and proxy-anchor losses are functions of these, row by row. With q = 0 the map is
// linear; circle's slope depends on the score, but is a constant to its derivative: dl/ds = slope. Where y is x, a row
// is not its own column and scores are symmetric: every unordered pair is computed once and enters the states of both.
// The upstream gradient of a row is known only when all of its sums are, outside, so gradients come from a pass of
// their own: half the scores twice and both products on a half, two products in all, the floor of the symmetric case.
#include "cpu/mask.hpp"
#include "cpu/strip.hpp"
#include "pairwise/reduce.hpp"

namespace nearfar {
namespace {

/// What both passes know of a pair. Scores that are left out are `kOut`, which no score is.
template <class T>
struct LabelledPairs {
  using P = Policy<T>;
  static constexpr T kOut = std::numeric_limits<T>::lowest();

  explicit LabelledPairs(const LabelledLseParams<T>& p, const Operands<T>& o)
      : mask{o, static_cast<double>(kOut), p.same},
        power(static_cast<T>(p.power)),
        x_(ceil_div(p.x.n, P::kStripRows) * P::kStripRows),
        y_(o.chunks.tiles * P::MR) {
    for (int k = 0; k < 2; ++k) {
      sign_[k] = static_cast<T>(p.maps[k].sign);
      q_[k] = static_cast<T>(p.maps[k].q);
      r_[k] = static_cast<T>(p.maps[k].r);
      shift_[k] = static_cast<T>(p.maps[k].shift);
    }
    common = p.normalize;
    for (int k = 0; k < 2; ++k) set_base(k, p.maps[k], p.scale);
    for (int64_t i = 0; i < ceil_div(p.x.n, P::kStripRows) * P::kStripRows; ++i)
      x_[i] = i < p.x.n ? p.labels_x[i] : IntOf<T>(-1);
    for (int64_t j = 0; j < o.chunks.tiles * P::MR; ++j) y_[j] = j < p.y.n ? p.labels_y[j] : IntOf<T>(-1);
  }

  NEARFAR_INLINE IVec<T> labels_of_rows(int64_t row) const {
    IVec<T> own;
    __builtin_memcpy(&own, x_.get() + row, sizeof own);
    return own;
  }
  NEARFAR_INLINE IVec<T> label_of_column(int64_t j) const { return isplat<T>(y_[j]); }

  NEARFAR_INLINE Vec<T> slope(Vec<T> s, IVec<T> same) const {
    const Vec<T> own = splat(sign_[0]) * vmax(Vec<T>{}, splat(q_[0]) * s + splat(r_[0]));
    const Vec<T> other = splat(sign_[1]) * vmax(Vec<T>{}, splat(q_[1]) * s + splat(r_[1]));
    return select(same, own, other);
  }
  /// -inf where a pair is left out. The choice also keeps the compiler from fusing this product with what is subtracted
  /// next: both passes must see the same logit, to the last bit, or a large one may exceed its own normaliser.
  NEARFAR_INLINE Vec<T> logit(Vec<T> s, Vec<T> slope, IVec<T> same) const {
    const Vec<T> l = slope * (s - select(same, splat(shift_[0]), splat(shift_[1])));
    return select(s == splat(kOut), splat<T>(static_cast<T>(-kInfinity)), l);
  }

  const Mask<T> mask;
  const T power;
  bool common;  // `base` serves all rows and columns
  T base[2];

 private:
  /// Scores of unit rows are at most scale. Where the logits of all such scores are within a range whose exponentials
  /// are all normal numbers, one base serves rows and columns alike: one exponential a pair, no maxima first.
  void set_base(int k, const ScoreMap& map, double scale) {
    constexpr double kSafeExponent = 60;
    double low = kInfinity, high = -kInfinity;
    // A map's extremes: at the ends, where its slope vanishes, where its derivative does.
    const double places[] = {-scale, scale, -map.r / map.q, (map.q * map.shift - map.r) / (2 * map.q)};
    for (double s : places) {
      if (!(std::fabs(s) <= scale)) continue;
      const double logit = map.sign * std::fmax(map.q * s + map.r, 0) * (s - map.shift);
      low = std::fmin(low, logit);
      high = std::fmax(high, logit);
    }
    base[k] = static_cast<T>((low + high) / 2);
    common = common && high - low <= 2 * kSafeExponent;
  }

  Buffer<IntOf<T>> x_, y_;
  T sign_[2], q_[2], r_[2], shift_[2];
};

/// K sums of one lane each of rows or columns; the largest terms of the first two are their bases, and power times the
/// second's is the third's.
template <class T, int K>
struct LabelledSums {
  Vec<T> top[2], sum[K];

  NEARFAR_INLINE static Vec<T> nothing() { return splat<T>(static_cast<T>(-kInfinity)); }
  NEARFAR_INLINE void raise(Vec<T> l, IVec<T> same) {
    top[0] = vmax(select(same, l, nothing()), top[0]);
    top[1] = vmax(select(same, nothing(), l), top[1]);
  }
  NEARFAR_INLINE static Vec<T> base(Vec<T> top) { return select(top == nothing(), Vec<T>{}, top); }
  /// What a pair adds to each sum.
  NEARFAR_INLINE static void terms(Vec<T> l, IVec<T> same, const Vec<T> (&bases)[2], T power, Vec<T> (&e)[K]) {
    const Vec<T> above = l - select(same, bases[0], bases[1]), one = exp_flush(above);
    e[0] = select(same, one, Vec<T>{});
    e[1] = select(same, Vec<T>{}, one);
    // Not where nothing is: a power of 0 would make a term of it.
    if constexpr (K == 3) e[2] = select(same | (l == nothing()), Vec<T>{}, exp_flush(splat(power) * above));
  }
  NEARFAR_INLINE void add(Vec<T> l, IVec<T> same, const Vec<T> (&bases)[2], T power) {
    Vec<T> e[K];
    terms(l, same, bases, power, e);
    for (int k = 0; k < K; ++k) sum[k] += e[k];
  }
};

template <class T, int K>
struct LabelledLseCell {
  using P = Policy<T>;
  using Sums = LabelledSums<T, K>;
  static constexpr bool kScores = true;
  static constexpr int kStored = K + 2;  // two bases and K sums

  LabelledLseCell(const LabelledPairs<T>& labelled, const Operands<T>& o, bool with_columns, LogSumExp* rows)
      : pairs(labelled),
        columns_wanted(with_columns),
        states(rows),
        row_size(o.chunks.count * P::kStripRows),
        column_size(with_columns ? o.chunks.tiles * P::MR * P::NR : 0),
        of_rows(kStored * row_size),
        of_columns(kStored * column_size) {
    for (int64_t k = 0; k < 2 * column_size; ++k)
      of_columns[k] = pairs.common ? pairs.base[k / column_size] : static_cast<T>(-kInfinity);
    for (int64_t k = 2 * column_size; k < kStored * column_size; ++k) of_columns[k] = 0;
  }

  void map(const Block<T>& b) {
    pairs.mask.apply(b);
    if (pairs.common) return columns_wanted ? both<true>(b) : both<false>(b);
    rows(b);
    if (columns_wanted) columns(b);
  }

  NEARFAR_INLINE Vec<T> logit(Vec<T> s, IVec<T> same) const { return pairs.logit(s, pairs.slope(s, same), same); }

  /// Each chunk has its own state of every row.
  NEARFAR_INLINE void store_row(const Block<T>& b, int64_t row, const Vec<T> (&bases)[2], const Sums& state) {
    T* out = &of_rows[b.chunk * P::kStripRows + row];
    for (int k = 0; k < 2; ++k) store(out + k * row_size, bases[k]);
    for (int k = 0; k < K; ++k) store(out + (2 + k) * row_size, state.sum[k]);
  }

  /// With a common base: rows, and columns if wanted, from the same exponentials.
  template <bool COLUMNS>
  void both(const Block<T>& b) {
    const Vec<T> bases[2] = {splat(pairs.base[0]), splat(pairs.base[1])};
    for (int64_t p = 0; p < b.panels; ++p)
      for (int v = 0; v < P::kVectors; ++v) {
        const T* data = b.panel(p) + v * kLanes<T>;
        const int64_t row = p * P::NR + v * kLanes<T>;
        const IVec<T> own = pairs.labels_of_rows(b.row + row);
        T* column = COLUMNS ? &of_columns[2 * column_size + b.column * P::NR + v * kLanes<T>] : nullptr;
        Sums state = {};
        for (int64_t j = 0; j < b.columns; ++j) {
          const IVec<T> same = own == pairs.label_of_column(b.column + j);
          Vec<T> e[K];
          Sums::terms(logit(load(data + j * P::NR), same), same, bases, pairs.power, e);
          for (int k = 0; k < K; ++k) {
            state.sum[k] += e[k];
            T* place = column + k * column_size + j * P::NR;
            if (COLUMNS) store(place, load(place) + e[k]);
          }
        }
        store_row(b, row, bases, state);
      }
  }

  /// Scores become logits, -inf where a pair is left out.
  void rows(const Block<T>& b) {
    for (int64_t p = 0; p < b.panels; ++p)
      for (int v = 0; v < P::kVectors; ++v) {
        T* data = b.panel(p) + v * kLanes<T>;
        const IVec<T> own = pairs.labels_of_rows(b.row + p * P::NR + v * kLanes<T>);
        Sums state = {};
        state.top[0] = state.top[1] = Sums::nothing();
        for (int64_t j = 0; j < b.columns; ++j) {
          const IVec<T> same = own == pairs.label_of_column(b.column + j);
          const Vec<T> l = logit(load(data + j * P::NR), same);
          store(data + j * P::NR, l);
          state.raise(l, same);
        }
        const Vec<T> bases[2] = {Sums::base(state.top[0]), Sums::base(state.top[1])};
        for (int64_t j = 0; j < b.columns; ++j)
          state.add(load(data + j * P::NR), own == pairs.label_of_column(b.column + j), bases, pairs.power);
        store_row(b, p * P::NR + v * kLanes<T>, bases, state);
      }
  }

  /// Columns keep one state per lane; lanes are merged once, at the end.
  void columns(const Block<T>& b) {
    for (int64_t j = 0; j < b.columns; ++j) {
      const IVec<T> label = pairs.label_of_column(b.column + j);
      for (int v = 0; v < P::kVectors; ++v) {
        const int64_t within = j * P::NR + v * kLanes<T>;
        T* stored = &of_columns[b.column * P::NR + within];
        Sums state;
        Vec<T> before[2];
        for (int k = 0; k < 2; ++k) before[k] = state.top[k] = load(stored + k * column_size);
        for (int64_t p = 0; p < b.panels; ++p)
          state.raise(load(b.panel(p) + within), label == pairs.labels_of_rows(b.row + p * P::NR + v * kLanes<T>));
        const Vec<T> bases[2] = {Sums::base(state.top[0]), Sums::base(state.top[1])};
        for (int k = 0; k < K; ++k) {
          const Vec<T> shrunk = before[k ? 1 : 0] - bases[k ? 1 : 0];
          const Vec<T> old = load(stored + (2 + k) * column_size);
          // No terms yet: nothing to shrink, and power times -inf may be NaN.
          const Vec<T> kept = select(before[k ? 1 : 0] == Sums::nothing(), old,
                                     old * exp_flush(k == 2 ? splat(pairs.power) * shrunk : shrunk));
          state.sum[k] = kept;
        }
        for (int64_t p = 0; p < b.panels; ++p)
          state.add(load(b.panel(p) + within), label == pairs.labels_of_rows(b.row + p * P::NR + v * kLanes<T>), bases,
                    pairs.power);
        for (int k = 0; k < 2; ++k) store(stored + k * column_size, state.top[k]);
        for (int k = 0; k < K; ++k) store(stored + (2 + k) * column_size, state.sum[k]);
      }
    }
  }

  void close(int64_t row, int64_t rows, int64_t chunks) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < chunks; ++c) merge(of_rows.get() + c * P::kStripRows + i, row_size, row + i);
  }
  const T* factor(int64_t) const { return nullptr; }

  /// Adds what columns have gathered to the states of the same rows.
  void close_columns(int64_t n) {
    for (int64_t j = 0; j < n; ++j)
      for (int lane = 0; lane < P::NR; ++lane) merge(of_columns.get() + j * P::NR + lane, column_size, j);
  }

  void merge(const T* stored, int64_t size, int64_t row) {
    for (int k = 0; k < K; ++k) {
      const double sum = static_cast<double>(stored[(2 + k) * size]),
                   top = static_cast<double>(stored[(k ? 1 : 0) * size]);
      if (sum == 0) continue;
      states[row * K + k].add(k == 2 ? top * static_cast<double>(pairs.power) : top, sum);
    }
  }

  const LabelledPairs<T>& pairs;
  const bool columns_wanted;
  LogSumExp* states;  // (n, K)
  const int64_t row_size, column_size;
  Buffer<T> of_rows, of_columns;
};

/// W_ij = sum_k g_ik e^{l_ijk - lse_ik} dl_ijk/ds, and the same of columns where y is x. COMMON: bases in place of lse,
/// so that rows and columns share their exponentials.
template <class T, int K, bool COLUMNS, bool COMMON>
struct LabelledWeightCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;

  void map(const Block<T>& b) {
    pairs.mask.apply(b);
    for (int64_t p = 0; p < b.panels; ++p)
      for (int v = 0; v < P::kVectors; ++v) {
        T* data = b.panel(p) + v * kLanes<T>;
        const int64_t row = b.row + p * P::NR + v * kLanes<T>;
        const IVec<T> own = pairs.labels_of_rows(row);
        Vec<T> lse[K], weight[K];
        for (int k = 0; k < K; ++k) {
          lse[k] = load(row_lse + k * row_size + row);
          weight[k] = load(row_weight + k * row_size + row);
        }
        for (int64_t j = 0; j < b.columns; ++j) {
          const Vec<T> s = load(data + j * P::NR);
          const IVec<T> same = own == pairs.label_of_column(b.column + j);
          const Vec<T> slope = pairs.slope(s, same), l = pairs.logit(s, slope, same);
          Vec<T> other_lse[K], other_weight[K];
          if constexpr (COLUMNS) {
            const T* c = column_terms + (b.column + j) * 2 * K;
            for (int k = 0; k < K; ++k) {
              other_lse[k] = splat(c[k]);
              other_weight[k] = splat(c[K + k]);
              if (COMMON) other_weight[k] += weight[k];
            }
          }
          Vec<T> w;
          if constexpr (COLUMNS && COMMON) {
            w = weights(l, same, lse, other_weight);
          } else {
            w = weights(l, same, lse, weight);
            if constexpr (COLUMNS) w += weights(l, same, other_lse, other_weight);
          }
          store(data + j * P::NR, select(s == splat(pairs.kOut), Vec<T>{}, slope * w));
        }
      }
  }
  NEARFAR_INLINE Vec<T> weights(Vec<T> l, IVec<T> same, const Vec<T> (&lse)[K], const Vec<T> (&weight)[K]) const {
    Vec<T> w = select(same, weight[0], weight[1]) * exp_flush(l - select(same, lse[0], lse[1]));
    if constexpr (K == 3) {
      const Vec<T> e = splat(pairs.power) * weight[2] * exp_flush(splat(pairs.power) * l - lse[2]);
      w += select(same, Vec<T>{}, e);
    }
    return w;
  }
  void close(int64_t, int64_t, int64_t) {}
  const T* factor(int64_t) const { return nullptr; }

  const LabelledPairs<T>& pairs;
  const int64_t row_size;
  const T *row_lse, *row_weight;  // (K, row_size), padded to whole strips
  const T* column_terms;          // (columns, 2 K): lse and weights, padded to whole tiles
};

template <class T, int K>
class LabelledLse {
  using P = Policy<T>;

 public:
  explicit LabelledLse(LabelledLseParams<T>& params)
      : p(params),
        o(params.x, params.y, params.normalize, false, params.dx != nullptr, params.threads),
        pairs(params, o) {}

  void run() {
    if (!p.dx) return values();
    if (pairs.common) return p.same ? gradients<true, true>() : gradients<false, true>();
    return p.same ? gradients<true, false>() : gradients<false, false>();
  }

 private:
  StripPlan<T> plan() const {
    StripPlan<T> plan;
    plan.triangle = p.same;
    plan.scale = static_cast<T>(p.scale);
    plan.threads = p.threads;
    plan.dx = p.dx;
    plan.dy = p.dy;
    return plan;
  }

  void values() {
    Buffer<LogSumExp> states(p.x.n * K);
    for (int64_t k = 0; k < p.x.n * K; ++k) states[k] = LogSumExp{};
    LabelledLseCell<T, K> cell(pairs, o, p.same, states.get());
    StripPass<T, LabelledLseCell<T, K>>(o, cell, plan()).run();
    if (p.same) cell.close_columns(p.x.n);
    for (int64_t k = 0; k < p.x.n * K; ++k) p.lse[k] = states[k].value();
  }

  template <bool COLUMNS, bool COMMON>
  void gradients() {
    const int64_t n = p.x.n, rows = ceil_div(n, P::kStripRows) * P::kStripRows, columns = o.chunks.tiles * P::MR;
    Buffer<T> row_lse(K * rows), row_weight(K * rows), column_terms(COLUMNS ? columns * 2 * K : 0);
    // An empty sum has no terms to weigh. What a base is off its normaliser, by rounding or because it is a common one,
    // its weight makes good.
    auto empty = [&](int64_t i, int k) { return i >= n || p.lse[i * K + k] == -kInfinity; };
    auto lse = [&](int64_t i, int k) {
      if (COMMON) return k == 2 ? pairs.power * pairs.base[1] : pairs.base[k];
      return empty(i, k) ? T(0) : static_cast<T>(p.lse[i * K + k]);
    };
    auto weight = [&](int64_t i, int k) {
      const double base = static_cast<double>(lse(i, k));
      return empty(i, k) ? T(0) : static_cast<T>(p.grad[i * K + k] * std::exp(base - p.lse[i * K + k]));
    };
    for (int k = 0; k < K; ++k) {
      for (int64_t i = 0; i < rows; ++i) {
        row_lse[k * rows + i] = lse(i, k);
        row_weight[k * rows + i] = weight(i, k);
      }
      for (int64_t j = 0; COLUMNS && j < columns; ++j) {
        column_terms[j * 2 * K + k] = lse(j, k);
        column_terms[j * 2 * K + K + k] = weight(j, k);
      }
    }
    using Cell = LabelledWeightCell<T, K, COLUMNS, COMMON>;
    Cell cell{pairs, rows, row_lse.get(), row_weight.get(), column_terms.get()};
    StripPass<T, Cell>(o, cell, plan()).run();
    p.dscale = finish_gradients(o.x, o.y, p.scale, p.same ? 2 : 1, p.threads, p.dx, p.dy);
  }

  LabelledLseParams<T>& p;
  Operands<T> o;
  LabelledPairs<T> pairs;
};

template <class T>
void run(LabelledLseParams<T>& p) {
  if (p.terms == 3) {
    LabelledLse<T, 3>(p).run();
  } else {
    LabelledLse<T, 2>(p).run();
  }
}

}  // namespace

namespace NEARFAR_ISA {
void labelled_lse(LabelledLseParams<float>& p) { run(p); }
#if !defined(NEARFAR_BASE)  // which a level with a base takes from there
void labelled_lse(LabelledLseParams<double>& p) { run(p); }
#endif
}  // namespace NEARFAR_ISA
}  // namespace nearfar
