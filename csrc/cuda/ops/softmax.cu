// Softmax over pairs: InfoNCE, CLIP, NT-Xent. What is computed is said in cpu/ops/softmax.cpp; here is in which order.
//
// Log-sum-exps: strips of rows; every tile leaves one partial state for each of its rows (and columns), merged in
// order. rows, where whole rows of scores fit a strip: scores stay in the strip, and become weights when the strip's
// log-sum-exps are known: three products in all. Else the weights come from a second product of the same scores, once
// every normaliser is known: four products (three for NT-Xent, whose weights are symmetric).
#include "cuda/softmax.hpp"

namespace nearfar {
namespace {

using cuda::SoftmaxDevice;

/// What is in every denominator before any column: own negatives; and the positives, which are kept apart. A warp a
/// row.
template <class T>
struct FirstStates {
  Source<T> x, positive, paired;
  Multiplier multiplier;
  int64_t n, m, shift, each;
  LogSumExp *states, *column_states;  // column_states null: not wanted
  double* positive_score;
  T* paired_score;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    const bool own = i < n;
    if (!own && (i >= m || !column_states)) return;
    LogSumExp state;
    double score = 0;
    if (own) {
      const double scale = multiplier();
      if (positive.rows.n > 0) score = scale * warp_dot(x, i, positive, (i + shift) % n);
      for (int64_t q = i * each; q < (i + 1) * each; ++q) {
        const double value = scale * warp_dot(x, i, paired, q);
        if (cuda::lane_index() == 0) paired_score[q] = static_cast<T>(value);
        state.add(value, 1);
      }
    }
    if (cuda::lane_index() != 0) return;
    if (own) states[i] = state, positive_score[i] = score;
    if (column_states && i < m) column_states[i] = LogSumExp();
  }
};

/// What the states of a row say.
struct Denominator {
  bool positive_in_sum;
  const double* positive_score;

  /// Nothing to tell the positive from, and the positive not in the sum.
  NEARFAR_DEVICE bool alone(const LogSumExp& state) const { return !positive_in_sum && state.s == 0; }
  /// Log of the whole denominator.
  NEARFAR_DEVICE double whole(LogSumExp state, int64_t i) const {
    if (positive_in_sum) state.add(positive_score[i], 1);
    return state.value();
  }
  NEARFAR_DEVICE double loss(const LogSumExp& state, int64_t i) const {
    if (alone(state)) return 0;
    const double z = state.value() - positive_score[i];
    if (!positive_in_sum) return z;
    return z > 0 ? z + log1p(exp(-z)) : log1p(exp(z));
  }
  /// d loss / d positive score.
  NEARFAR_DEVICE double slope(const LogSumExp& state, int64_t i) const {
    if (alone(state)) return 0;
    return positive_in_sum ? -1 / (1 + exp(positive_score[i] - state.value())) : -1;
  }
};

template <class T>
struct RowWeights {
  const T* weights;     // null: `weight`
  double weight, part;  // part: of the loss, one half where it is the mean of two
  NEARFAR_DEVICE double operator()(int64_t i) const {
    return part * (weights ? static_cast<double>(weights[i]) : weight);
  }
};

/// Normalisers and weights of lines [first, first + count): w e^{s - base}. An empty denominator has no weight.
/// `total`: the weights of a line together, the positive left out.
template <class T>
struct FillWeights {
  Denominator denominator;
  const LogSumExp* states;
  RowWeights<T> weights;
  int64_t first, count, valid;
  T *base, *weight, *total;
  Multiplier multiplier;
  bool unit;

  NEARFAR_DEVICE void operator()() const {
    const int64_t at = cuda::global_thread(), i = first + at;
    if (at >= count) return;
    double lse = 0, w = 0, own = 0;
    if (i < valid) lse = denominator.whole(states[i], i), w = weights(i), own = states[i].value();
    const bool empty = lse == -infinity<double>();
    total[i] = static_cast<T>(empty ? 0 : w * exp(own - lse));
    const double scale = multiplier();
    if (MaskedScores<T>::bounded_by(unit, scale)) w *= exp(scale - lse), lse = scale;
    base[i] = static_cast<T>(empty ? 0 : lse);
    weight[i] = static_cast<T>(empty ? 0 : w);
  }
};

/// Scores of a strip become weights, in place.
template <class T>
struct WeighStrip {
  PairWeight<T> weight;
  Weights<T> strip;
  NEARFAR_DEVICE void operator()() const {
    const Block& b = strip.block;
    const int64_t at = cuda::global_thread(), i = at / b.columns, j = at % b.columns;
    if (i >= b.rows) return;
    T& place = strip.w[i * strip.pitch + j];
    place = weight(b.row + i, b.column + j, place);
  }
};

/// Weights of float16 that were stored as e^{s - bound} are too faint where all scores of a row lie far below the
/// bound. Such rows take their own log-sum-exp for a base, and their tile is stored again, under other factors of its
/// rows. A warp for 128 rows, from `first`.
template <class T>
struct FindFaint {
  static constexpr double kFaintest = 1.0 / (1 << 25);  // mean of a row: 2^12 of it is a normal number, with room
  const LogSumExp* states;
  const T *factor, *total;
  int64_t first, rows, valid, columns;
  Multiplier multiplier;
  T *own, *weight;  // the other factor; what rows of the strip are still to be multiplied by
  int32_t* again;

  NEARFAR_DEVICE void operator()() const {
    const int64_t tile = cuda::global_warp(), from = first + tile * kPadRows;
    if (tile * kPadRows >= rows) return;
    const double scale = multiplier();
    const auto sum = [&](int64_t i) { return exp(states[i].value() - scale); };
    bool faint = false;
    for (int64_t i = from + cuda::lane_index(); i < from + kPadRows && i < valid; i += cuda::kWarp)
      faint |= sum(i) < kFaintest * static_cast<double>(columns) && states[i].s > 0;
    faint = cuda::ballot(faint);
    if (cuda::lane_index() == 0) again[tile] = faint;
    for (int64_t i = from + cuda::lane_index(); faint && i < from + kPadRows; i += cuda::kWarp) {
      const bool some = i < valid && states[i].s > 0;
      own[i] = static_cast<T>(some ? static_cast<double>(factor[i]) / sum(i) : 0.0);
      weight[i] = total[i];
    }
  }
};

/// Stores these tiles.
template <class T>
struct StoreFaint {
  static constexpr bool kBlocked = true;
  MaskedScores<T> masked;
  Weights<T> out;
  const int32_t* again;

  NEARFAR_DEVICE bool wants(int64_t i0, int64_t, int, int) const { return again[i0 / kPadRows]; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    masked.with_exponentials(f, out.block, [&](auto exponential) {
      out.weigh(f, {masked.x_of(f, out.block)}, {masked.y_of(f, out.block)},
                [=](const float* x, const float* y, float product, int a, int b) {
                  return exponential(*x, *y, product, a, b);
                });
    });
  }
};

/// Losses; and d loss / d score of positives and own negatives. A thread a row.
template <class T>
struct FinishLosses {
  Denominator denominator;
  const LogSumExp *states, *column_states;  // column_states: of `both`, else null
  RowWeights<T> weights;
  int64_t n, each;
  const T* paired_score;
  T* loss;
  double* loss_wide;
  T *positive_weight, *paired_weight;  // null: not wanted

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    if (i >= n) return;
    double value = denominator.loss(states[i], i);
    if (column_states) value = 0.5 * (value + denominator.loss(column_states[i], i));
    loss[i] = static_cast<T>(value);
    loss_wide[i] = value;
    if (!positive_weight) return;
    double slope = denominator.slope(states[i], i);
    if (column_states) slope += denominator.slope(column_states[i], i);
    positive_weight[i] = static_cast<T>(weights(i) * slope);
    const double lse = denominator.whole(states[i], i);
    for (int64_t q = i * each; q < (i + 1) * each; ++q)
      paired_weight[q] = static_cast<T>(weights(i) * exp(static_cast<double>(paired_score[q]) - lse));
  }
};

template <class T, class E>
class Softmax {
 public:
  Softmax(cuda::Context& context, const SoftmaxDevice<T>& params)
      : c(context),
        p(params),
        n(p.x.n),
        m(p.y.n),
        columns_(p.mode == SoftmaxMode::both),
        pairs_(c, p.x, p.y, p.normalize, false, p.dx != nullptr, true),
        strip_(c, pairs_, keeps_scores(), p.dx != nullptr, p.dx, p.mode == SoftmaxMode::pairs ? nullptr : p.dy),
        multiplier_{{p.scale_at, p.scale}} {}

  void run() {
    first_states();
    const MaskedScores<T> masked{pairs_.scores,
                                 multiplier_,
                                 n,
                                 m,
                                 p.positive_is_column ? p.positive_shift : -1,
                                 p.mode == SoftmaxMode::pairs,
                                 p.ids,
                                 p.ids,
                                 n,
                                 unit()};
    // The two passes cut all pairs alike, except that the first keeps whole rows together.
    const StripShape shape = keeps_scores() ? strip_.shape : tile_blocks(c, pairs_, 4);
    of_rows_ = c.take<PartialSum<T>>(shape.rows * tiles_of(shape));
    if (columns_) of_columns_ = c.take<PartialSum<T>>(shape.columns * ceil_div(shape.rows, 64));
    if (p.dx) {
      row_base_ = c.take<T>(pairs_.x.padded);
      row_weight_ = c.take<T>(pairs_.x.padded);
      column_base_ = columns_ ? c.take<T>(pairs_.y.padded) : row_base_;
      column_weight_ = columns_ ? c.take<T>(pairs_.y.padded) : row_weight_;
      row_total_ = c.take<T>(pairs_.x.padded);
    }
    if (keeps_blocks()) {
      strip_.fit(1);
      own_ = c.take<T>(pairs_.x.padded);
      again_ = c.take<int32_t>(shape.rows / kPadRows);
    }
    shape.for_blocks(pairs_.x.padded, pairs_.y.padded, [&](const Block& block) { lse_block(masked, block); });
    if (p.dx && !keeps_scores()) weight_pass(masked);
    finish();
  }

 private:
  bool unit() const { return p.normalize && pairs_.blocked(); }
  /// Three products in place of four. Blocked strips hold 16-bit numbers, which is too little for scores; exponentials
  /// with a common base are kept there, and rows are divided by their sums afterwards.
  bool keeps_scores() const {
    if (p.mode != SoftmaxMode::rows || !p.dx) return false;
    if (pairs_.blocked() && (n < kFewRows || p.scale_at || !MaskedScores<T>::bounded_by(unit(), p.scale))) return false;
    const int64_t size = pairs_.blocked() ? sizeof(E) : sizeof(T);
    return round_up(m, kPadRows) * kPadRows * size <= c.strip_bytes;
  }
  bool keeps_blocks() const { return pairs_.blocked() && keeps_scores(); }
  /// Rows that are divided by their sums are rounded once more, before they meet W^T. What nearly equal rows lose by it
  /// is alike, and so is more of a gradient the fewer there are: 5e-3 of 24, 2e-3 of 150 in bfloat16.
  static constexpr int64_t kFewRows = 128;
  RowWeights<T> row_weights() const { return {p.weights, p.weight, columns_ ? 0.5 : 1.0}; }
  Denominator denominator() const { return {p.positive_in_sum, positive_score_}; }

  void first_states() {
    const bool y_again = same_rows(p.positive, p.y), x_again = same_rows(p.positive, p.x);
    positive_ = y_again ? pairs_.scores.y : x_again ? pairs_.scores.x : source_of<T>(c, p.positive, p.normalize);
    paired_ = source_of<T>(c, p.paired, p.normalize);
    states_ = c.take<LogSumExp>(n);
    if (columns_) column_states_ = c.take<LogSumExp>(m);
    positive_score_ = c.take<double>(n);
    paired_score_ = c.take<T>(p.paired.n);
    c.launch_warps(columns_ && m > n ? m : n,
                   FirstStates<T>{pairs_.scores.x, positive_, paired_, multiplier_, n, m, p.positive_shift,
                                  p.paired_per_row, states_, column_states_, positive_score_, paired_score_});
  }

  void lse_block(const MaskedScores<T>& masked, const Block& b) {
    Weights<T> kept{};
    if (keeps_scores()) kept = strip_.open(b);
    const Plan plan = plan_scores(c, "log-sum-exp", pairs_, b);
    const int64_t tiles_m = ceil_div(b.rows, plan.tile), tiles_n = ceil_div(b.columns, plan.tile);
    if constexpr (sizeof(E) == 2)
      if (keeps_blocks())
        launch_scores(c, plan, pairs_, b, LseEpilogue<T, true>{masked, kept, b, tiles_m, tiles_n, of_rows_, nullptr});
    if (!keeps_blocks())
      launch_scores(c, plan, pairs_, b,
                    LseEpilogue<T, false>{masked, kept, b, tiles_m, tiles_n, of_rows_, of_columns_});
    merge_lse(c, pairs_, b, plan, of_rows_, of_columns_, states_, column_states_);
    if (!keeps_scores()) return;
    fill(states_, b.row, b.rows, n, row_base_, row_weight_, row_total_);
    if constexpr (std::is_same_v<E, F16>)
      if (keeps_blocks()) store_faint(masked, kept);
    if (keeps_blocks()) return strip_.products(kept, row_weight_);
    c.launch_threads(b.rows * b.columns, WeighStrip<T>{PairWeight<T>{row_base_, row_weight_, nullptr, nullptr}, kept});
    strip_.products(kept);
  }

  void fill(const LogSumExp* states, int64_t first, int64_t count, int64_t valid, T* base, T* weight, T* total) {
    RowWeights<T> weights = row_weights();
    c.launch_threads(count, FillWeights<T>{denominator(), states, weights, first, count, valid, base, weight, total,
                                           multiplier_, unit()});
  }
  void store_faint(const MaskedScores<T>& masked, const Weights<T>& kept) {
    const Block& b = kept.block;
    c.launch_warps(b.rows / kPadRows, FindFaint<T>{states_, kept.x_factor, row_total_, b.row, b.rows, n, m, multiplier_,
                                                   own_, row_weight_, again_});
    Weights<T> other = kept;
    other.x_factor = own_;
    launch_blocked(c, pairs_, b, StoreFaint<T>{masked, other, again_});
  }

  void weight_pass(const MaskedScores<T>& masked) {
    fill(states_, 0, pairs_.x.padded, n, row_base_, row_weight_, row_total_);
    Numbers<T> of_columns{nullptr, 0};
    if (columns_) {
      T* column_total = c.take<T>(pairs_.y.padded);
      fill(column_states_, 0, pairs_.y.padded, m, column_base_, column_weight_, column_total);
      of_columns = {column_total, pairs_.y.padded};
    }
    if (p.mode == SoftmaxMode::rows) {
      column_base_ = c.take<T>(pairs_.y.padded);
      column_weight_ = c.take<T>(pairs_.y.padded);
      fill_absent(c, pairs_.y.padded, column_base_, column_weight_);
    }
    strip_.fit(2, Numbers<T>{row_total_, pairs_.x.padded}, of_columns);
    weight_blocks(c, pairs_, strip_, masked, {row_base_, row_weight_, column_base_, column_weight_});
  }

  void finish() {
    double* wide = c.take<double>(n);
    T* positive_weight = p.dx ? c.take<T>(n) : nullptr;
    T* paired_weight = p.dx ? c.take<T>(p.paired.n) : nullptr;
    c.launch_threads(n, FinishLosses<T>{denominator(), states_, column_states_, row_weights(), n, p.paired_per_row,
                                        paired_score_, p.loss, wide, positive_weight, paired_weight});
    c.launch(1, StoreSum{{wide, n}, p.loss_total});
    if (!p.dx) return;
    const Source<T>& x = pairs_.scores.x;
    const bool alias = p.dpositive == p.dx;
    const Term<T> anchor{p.positive.n ? Enter::own : Enter::none, positive_weight, positive_, n, p.positive_shift, 1};
    const Term<T> target{p.positive.n ? Enter::reverse : Enter::none, positive_weight, x, n, p.positive_shift, 1};
    const Term<T> negatives{p.paired.n ? Enter::paired : Enter::none, paired_weight, paired_, n, 0, p.paired_per_row};
    double* along = c.take<double>(n);
    FinishRows<T> step = finish_scaled<T>(multiplier_, along);
    step.terms[0] = anchor;
    step.terms[1] = negatives;
    if (alias) step.terms[2] = target;
    finish_rows(c, x, p.dx, step);
    c.launch(1, ScaleSlope{{along, n}, multiplier_, p.mode == SoftmaxMode::pairs ? 2.0 : 1.0, p.dscale_at});
    FinishRows<T> other = finish_scaled<T>(multiplier_, nullptr);
    if (p.dy && p.dy != p.dx) {
      if (p.dpositive == p.dy) other.terms[0] = target;
      finish_rows(c, pairs_.scores.y, p.dy, other);
    }
    if (p.dpositive && p.dpositive != p.dy && p.dpositive != p.dx) {
      other.terms[0] = target;
      finish_rows(c, positive_, p.dpositive, other);
    }
    if (p.dpaired) {
      other.terms[0] = {Enter::paired_by, paired_weight, x, n, 0, p.paired_per_row};
      other.fresh = true;
      finish_rows(c, paired_, p.dpaired, other);
    }
  }

  cuda::Context& c;
  const SoftmaxDevice<T>& p;
  const int64_t n, m;
  const bool columns_;
  Pairs<T, E> pairs_;
  Strip<T, E> strip_;
  const Multiplier multiplier_;
  Source<T> positive_, paired_;
  LogSumExp *states_ = nullptr, *column_states_ = nullptr;
  double* positive_score_ = nullptr;
  T* paired_score_ = nullptr;
  PartialSum<T>*of_rows_ = nullptr, *of_columns_ = nullptr;
  T *row_base_ = nullptr, *row_weight_ = nullptr, *column_base_ = nullptr, *column_weight_ = nullptr;
  T *row_total_ = nullptr, *own_ = nullptr;
  int32_t* again_ = nullptr;
};

}  // namespace

namespace cuda {

template <class T>
void softmax(Context& c, const SoftmaxDevice<T>& p) {
  with_element<T>(p.x.dtype, false, [&](auto element) { Softmax<T, decltype(element)>(c, p).run(); });
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(softmax, SoftmaxDevice)
