// Softmax over pairs: InfoNCE, CLIP, NT-Xent, DCL, SupCon.
//
//   loss_i = log( e^{s_i+} + sum_{j in D(i)} e^{s_ij} ) - s_i+       s_ij = scale <x_i, y_j>
//
// D(i) are the columns that the mask leaves. The positive s_i+ is computed from its two rows and kept apart, so that
// loss_i = softplus(z_i), z_i = log sum_{D(i)} e^{s_ij} - s_i+, and its slope -1 / (1 + e^{-z_i}) by the positive keep
// their digits when they are small. The gradient weights are dL/ds_ij = w_i e^{s_ij - lse_i} (and the same of columns),
// so both gradients are products with exp(s), which a strip keeps until its log-sum-exp is known: three matrix products
// in all. SupCon's anchors have a set of positives (positives.hpp), whose mean score takes the place of s_i+, and the
// denominator holds every column but their own; those with one positive are as above. Where columns have a normaliser
// too (CLIP, NT-Xent) it is known only after a whole pass, so scores are computed twice, but for so few that they are
// kept.
#include "cpu/softmax.hpp"

#include "cpu/few.hpp"
#include "cpu/positives.hpp"

namespace nearfar {
namespace {

template <class T>
class Softmax {
  using P = Policy<T>;

 public:
  explicit Softmax(SoftmaxParams<T>& params)
      : p(params),
        n(params.x.n),
        m(params.y.n),
        d(params.x.d),
        few_(params.mode == SoftmaxMode::rows && fewest<T>(n, m, d)),
        o(params.x, params.y, params.normalize && !few_, false, params.dx != nullptr, params.threads, ScoreKind::dot,
          !few_),
        positive(params.positive),
        paired(params.paired),
        sets(params.positives, o.x, params.threads),
        mask{o, -kInfinity, params.mode == SoftmaxMode::pairs, nullptr, params.ids_x, params.ids_y} {
    if (p.normalize && few_) o.x.normalize(p.threads), o.y.normalize_as_read();
    if (p.normalize && positive.n() > 0) positive.normalize(p.threads);
    if (p.normalize && paired.n() > 0) paired.normalize(p.threads);
    partner_ = Buffer<int64_t>(n);
    for (int64_t i = 0; i < n; ++i) partner_[i] = sets.given() ? sets.partner(i) : (i + p.positive_shift) % n;
    if (p.positive_is_column) mask.partner = partner_.get();
    p.anchors = sets.given() ? sets.anchors() : n;
    if (p.weight_of_mean && p.anchors > 0) p.weight /= static_cast<double>(p.anchors);
  }

  void run() {
    states_ = Buffer<LogSumExp>(n);
    positive_score_ = Buffer<double>(n);
    first_states();
    const bool gradient = p.dx != nullptr, columns = p.mode != SoftmaxMode::rows;
    const int64_t lanes = !few_ ? P::kStripRows : p.dy ? P::NR : 0;  // that wait for the rows' log-sum-exps
    const int64_t strip = m * lanes * static_cast<int64_t>(sizeof(T));
    if (columns) {
      column_states_ = Buffer<LogSumExp>(p.mode == SoftmaxMode::both ? n : 0);
      const int64_t size = StripPass<T, LseCell<T, true>>::kept_size(o, p.mode == SoftmaxMode::pairs);
      const int64_t bytes = size * static_cast<int64_t>(sizeof(T));
      if (gradient && bytes <= p.strip_budget) {
        kept_ = Buffer<T>(size);
        advise_huge_pages(kept_.get(), bytes);
      }
      lse_pass<true>(false);
      if (gradient) weight_pass<true>();
    } else if (gradient && strip <= p.strip_budget) {
      lse_pass<false>(true);
    } else {
      lse_pass<false>(false);
      if (gradient) weight_pass<false>();
    }
    finish();
  }

 private:
  /// Whether the positive of row i is one row that is in the denominator but not in its state.
  bool apart(int64_t i) const { return sets.given() ? partner_[i] >= 0 : p.positive_in_sum; }
  /// Whether the only positive of row i does not see in row i its own: their pair is masked for both.
  bool one_sided(int64_t i) const { return sets.given() && partner_[i] >= 0 && partner_[partner_[i]] != i; }
  double weight_of(int64_t i) const {
    if (sets.given() && sets.count(i) == 0) return 0;
    return (p.weights ? static_cast<double>(p.weights[i]) : p.weight) * (p.mode == SoftmaxMode::both ? 0.5 : 1.0);
  }

  /// Scores of the positives, which are kept apart; and what is in the denominator before any column: own negatives.
  void first_states() {
    if (paired.n() > 0) paired_score_ = Buffer<T>(paired.n());
    parallel_for(o.x.tasks(), p.threads, [&](int64_t task, int) {
      Buffer<T> rows(2 * d);
      T *own = rows.get(), *other = rows.get() + d;
      for (int64_t i = task * Source<T>::kRowsPerTask; i < o.x.end(task); ++i) {
        o.x.get(i, own);
        LogSumExp state;
        positive_score_[i] = 0;
        if (positive.n() > 0 && partner_[i] >= 0) {
          positive.get(partner_[i], other);
          positive_score_[i] = p.scale * Source<T>::dot(own, other, d);
        } else if (sets.given()) {
          positive_score_[i] = p.scale * sets.mean(i);
        }
        for (int64_t k = 0; k < p.paired_per_row; ++k) {
          paired.get(i * p.paired_per_row + k, other);
          const double score = p.scale * Source<T>::dot(own, other, d);
          paired_score_[i * p.paired_per_row + k] = static_cast<T>(score);
          state.add(score, 1);
        }
        states_[i] = state;
      }
    });
    for (int64_t i = 0; i < n; ++i)
      if (one_sided(i)) states_[partner_[i]].add(positive_score_[i], 1);
  }

  StripPlan<T> plan(bool products, bool two_phase) const {
    StripPlan<T> plan;
    plan.triangle = p.mode == SoftmaxMode::pairs;
    plan.two_phase = two_phase;
    plan.scale = static_cast<T>(p.scale);
    plan.threads = p.threads;
    if (products) plan.dx = p.dx, plan.dy = p.dy;
    plan.kept = kept_.get();
    plan.scored = products && plan.kept;
    return plan;
  }

  template <bool COLUMNS>
  void lse_pass(bool keep) {
    LseCell<T, COLUMNS> cell(o, mask, keep, common_base(p.scale, p.normalize));
    cell.rows_state = states_.get();
    cell.positive = p.positive_in_sum ? positive_score_.get() : nullptr;
    cell.weights = p.weights;
    cell.weight = p.weight;
    all_pairs(o, cell, plan(keep, keep));
    if (!COLUMNS) return;
    for (int64_t j = 0; j < m; ++j) {
      if (p.mode == SoftmaxMode::pairs) {
        states_[j].merge(cell.column_state(j));
      } else {
        column_states_[j] = cell.column_state(j);
      }
    }
  }

  const LogSumExp& column_state(int64_t i) const {
    return p.mode == SoftmaxMode::both ? column_states_[i] : states_[i];
  }
  /// Log of a whole denominator, the positive of row i included.
  double denominator(LogSumExp state, int64_t i) const {
    if (apart(i)) state.add(positive_score_[i], 1);
    return state.value();
  }
  /// An anchor without a positive, or with nothing to tell it from, counts as 0.
  bool nothing(const LogSumExp& state, int64_t i) const {
    return sets.given() ? sets.count(i) == 0 : !apart(i) && state.s == 0;
  }
  double loss_of(const LogSumExp& state, int64_t i) const {
    if (nothing(state, i)) return 0;
    const double z = state.value() - positive_score_[i];
    if (!apart(i)) return z;
    return z > 0 ? z + std::log1p(std::exp(-z)) : std::log1p(std::exp(z));
  }
  /// d loss_of / d positive_score_.
  double slope_of(const LogSumExp& state, int64_t i) const {
    if (nothing(state, i)) return 0;
    return apart(i) ? -1 / (1 + std::exp(positive_score_[i] - state.value())) : -1;
  }

  template <bool COLUMNS>
  void weight_pass() {
    const int64_t rows = ceil_div(n, P::kStripRows) * P::kStripRows, columns = o.chunks.tiles * P::MR;
    Buffer<T> row_lse(rows), row_weight(rows), column_lse(columns), column_weight(columns);
    const double base = COLUMNS ? common_base(p.scale, p.normalize) : 0;
    // A normaliser and a weight; an empty denominator has no weights.
    auto fill = [&](double lse, double weight, T& base_out, T& weight_out) {
      const bool empty = lse == -kInfinity;
      base_out = static_cast<T>(base > 0 ? base : empty ? 0 : lse);
      weight_out = static_cast<T>(base > 0 ? (empty ? 0 : weight * std::exp(base - lse)) : weight);
    };
    for (int64_t i = 0; i < rows; ++i)
      fill(i < n ? denominator(states_[i], i) : 0, i < n ? weight_of(i) : 0, row_lse[i], row_weight[i]);
    for (int64_t j = 0; COLUMNS && j < columns; ++j)
      fill(j < m ? denominator(column_state(j), j) : 0, j < m ? weight_of(j) : 0, column_lse[j], column_weight[j]);
    const bool scored = kept_.get() != nullptr;
    const T *a = row_lse.get(), *u = row_weight.get(), *b = column_lse.get(), *v = column_weight.get();
    if (!sets.by_class()) return multiply(WeightCell<T, COLUMNS, false>{mask, a, u, b, v, base > 0, scored});
    const int64_t padded = rows > columns ? rows : columns;
    Buffer<IntOf<T>> classes(padded);
    Buffer<T> pull(padded);
    for (int64_t i = 0; i < padded; ++i) {
      classes[i] = i < n ? static_cast<IntOf<T>>(p.positives.classes[i]) : IntOf<T>(-1);
      pull[i] = i < n ? static_cast<T>(sets.share(i) * weight_of(i)) : T(0);
    }
    multiply(WeightCell<T, COLUMNS, true>{mask, a, u, b, v, base > 0, scored, classes.get(), pull.get()});
  }
  template <class Cell>
  void multiply(Cell cell) {
    all_pairs(o, cell, plan(true, false));
  }

  /// Losses; and of gradients what is not a column of the engine: positives, own negatives, scale, normalisation.
  void finish() {
    p.loss_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      double loss = loss_of(states_[i], i);
      if (p.mode == SoftmaxMode::both) loss = 0.5 * (loss + loss_of(column_states_[i], i));
      p.loss[i] = static_cast<T>(loss);
      p.loss_sum += loss;
    }
    p.dscale = 0;
    if (!p.dx) return;
    add_positives();
    if (sets.given() && !sets.by_class()) sets.add_gradient([&](int64_t i) { return -weight_of(i); }, p.dx);
    p.dscale = finish_gradients(o.x, o.y, p.scale, p.mode == SoftmaxMode::pairs ? 2 : 1, p.threads, p.dx, p.dy);
    if (p.dpositive && p.dpositive != p.dy && p.dpositive != p.dx)
      finish_gradient(positive, p.scale, p.threads, p.dpositive);
    if (p.dpaired) finish_gradient(paired, p.scale, p.threads, p.dpaired);
  }

  /// dL/ds of the positive of row i.
  double positive_weight(int64_t i) const {
    const double slope = slope_of(states_[i], i);
    return weight_of(i) * (p.mode == SoftmaxMode::both ? slope + slope_of(column_states_[i], i) : slope);
  }

  /// dL/ds of that score in the denominator of the positive itself.
  double weight_in_other(int64_t i) const {
    const int64_t row = partner_[i];
    return weight_of(row) * std::exp(positive_score_[i] - denominator(states_[row], row));
  }

  void add_positives() {
    // dx and dpositive may be one array (NT-Xent), where row i is written for two anchors: serial there, by task
    // elsewhere.
    const bool alias = p.dpositive == p.dx;
    parallel_for(o.x.tasks(), alias ? 1 : p.threads, [&](int64_t task, int) {
      Buffer<T> rows(2 * d);
      T *own = rows.get(), *other = rows.get() + d;
      for (int64_t i = task * Source<T>::kRowsPerTask; i < o.x.end(task); ++i) {
        o.x.get(i, own);
        T* dx = p.dx + i * d;
        if (const int64_t row = partner_[i]; positive.n() > 0 && row >= 0) {
          const T w = static_cast<T>(positive_weight(i) + (one_sided(i) ? weight_in_other(i) : 0));
          positive.get(row, other);
          for (int64_t k = 0; k < d; ++k) dx[k] += w * other[k];
          if (T* out = p.dpositive ? p.dpositive + row * d : nullptr)
            for (int64_t k = 0; k < d; ++k) out[k] += w * own[k];
        }
        const double lse = denominator(states_[i], i), w = weight_of(i);
        for (int64_t q = i * p.paired_per_row; q < (i + 1) * p.paired_per_row; ++q) {
          const T weight = static_cast<T>(w * std::exp(static_cast<double>(paired_score_[q]) - lse));
          paired.get(q, other);
          for (int64_t k = 0; k < d; ++k) {
            dx[k] += weight * other[k];
            if (p.dpaired) p.dpaired[q * d + k] = weight * own[k];
          }
        }
      }
    });
  }

  SoftmaxParams<T>& p;
  const int64_t n, m, d;
  const bool few_;
  Operands<T> o;
  Source<T> positive, paired;
  PositiveSets<T> sets;
  Mask<T> mask;
  Buffer<int64_t> partner_;
  Buffer<LogSumExp> states_, column_states_;
  Buffer<double> positive_score_;
  Buffer<T> paired_score_;
  Buffer<T> kept_;  // scores of all pairs, where these are few
};

}  // namespace

namespace NEARFAR_ISA {
void softmax(SoftmaxParams<float>& p) { Softmax<float>(p).run(); }
#if !defined(NEARFAR_BASE)  // which a level with a base takes from there
void softmax(SoftmaxParams<double>& p) { Softmax<double>(p).run(); }
#endif
}  // namespace NEARFAR_ISA
}  // namespace nearfar
