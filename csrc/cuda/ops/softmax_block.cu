// One block of a softmax whose rows and columns are spread over processes: what is computed is said in
// cpu/ops/softmax_block.cpp. Two calls: log-sum-exps, a product; gradients once the whole normalisers are known, three,
// or two where y is x, whose weights are symmetric.
#include "cuda/softmax.hpp"

namespace nearfar {
namespace {

using cuda::SoftmaxBlockDevice;

/// Bases and weights: w e^{s - base}. What a base is off its normaliser, its weight makes good; an empty denominator
/// has none.
template <class T>
struct FillKnown {
  const double *lse, *upstream;
  int64_t n, padded;
  Multiplier multiplier;
  bool unit;
  T *base, *weight;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    if (i >= padded) return;
    const double own = i < n ? lse[i] : -infinity<double>(), scale = multiplier();
    const bool empty = own == -infinity<double>();
    base[i] = static_cast<T>(MaskedScores<T>::bounded_by(unit, scale) ? scale : empty ? 0.0 : own);
    weight[i] = empty ? T(0) : static_cast<T>(upstream[i] * exp(static_cast<double>(base[i]) - own));
  }
};

template <class T, class E>
class SoftmaxBlock {
 public:
  SoftmaxBlock(cuda::Context& context, const SoftmaxBlockDevice<T>& params)
      : c(context),
        p(params),
        n(p.x.n),
        m(p.y.n),
        pairs_(c, p.x, p.y, p.normalize, false, p.dx != nullptr, true),
        multiplier_{{p.scale_at, p.scale}},
        masked_{pairs_.scores, multiplier_, n, m, -1, p.same, p.own_ids, p.other_ids, m, unit()} {}

  void run() { p.dx ? gradients() : values(); }

 private:
  bool unit() const { return p.normalize && pairs_.blocked(); }

  void values() {
    LogSumExp *rows = start(n), *columns = p.lse_y ? start(m) : nullptr;
    const StripShape shape = tile_blocks(c, pairs_, 4);
    PartialSum<T>*of_rows = c.take<PartialSum<T>>(shape.rows * tiles_of(shape)), *of_columns = nullptr;
    if (columns) of_columns = c.take<PartialSum<T>>(shape.columns * ceil_div(shape.rows, 64));
    shape.for_blocks(pairs_.x.padded, pairs_.y.padded, [&](const Block& b) {
      const Plan plan = plan_scores(c, "log-sum-exp", pairs_, b);
      const int64_t tiles_m = ceil_div(b.rows, plan.tile), tiles_n = ceil_div(b.columns, plan.tile);
      launch_scores(c, plan, pairs_, b,
                    LseEpilogue<T, false>{masked_, Weights<T>{}, b, tiles_m, tiles_n, of_rows, of_columns});
      merge_lse(c, pairs_, b, plan, of_rows, of_columns, rows, columns);
    });
    c.launch_threads(n, StoreStates{n, rows, p.lse_x});
    if (columns) c.launch_threads(m, StoreStates{m, columns, p.lse_y});
  }
  LogSumExp* start(int64_t count) {
    LogSumExp* states = c.take<LogSumExp>(count);
    c.launch_threads(count, StartStates{count, states});
    return states;
  }

  void gradients() {
    Strip<T, E> strip(c, pairs_, false, true, p.dx, p.same ? nullptr : p.dy);
    PairWeight<T> weight = known(p.lse_x, p.weight_x, pairs_.x.padded, n);
    if (p.same) {
      weight.column_base = weight.row_base;
      weight.column_weight = weight.row_weight;
    } else if (p.lse_y) {
      const PairWeight<T> columns = known(p.lse_y, p.weight_y, pairs_.y.padded, m);
      weight.column_base = columns.row_base;
      weight.column_weight = columns.row_weight;
    } else {
      T *base = c.take<T>(pairs_.y.padded), *none = c.take<T>(pairs_.y.padded);
      fill_absent(c, pairs_.y.padded, base, none);
      weight.column_base = base;
      weight.column_weight = none;
    }
    strip.fit(2, Numbers<double>{p.weight_x, n}, Numbers<double>{p.weight_y, p.lse_y ? m : 0});
    weight_blocks(c, pairs_, strip, masked_, weight);
    double* along = c.take<double>(n);
    finish_rows(c, pairs_.scores.x, p.dx, finish_scaled<T>(multiplier_, along));
    c.launch(1, ScaleSlope{{along, n}, multiplier_, p.same ? 2.0 : 1.0, p.dscale_at});
    if (!p.same) finish_rows(c, pairs_.scores.y, p.dy, finish_scaled<T>(multiplier_, nullptr));
  }
  PairWeight<T> known(const double* lse, const double* upstream, int64_t padded, int64_t count) {
    T *base = c.take<T>(padded), *weight = c.take<T>(padded);
    c.launch_threads(padded, FillKnown<T>{lse, upstream, count, padded, multiplier_, unit(), base, weight});
    return {base, weight, nullptr, nullptr};
  }

  cuda::Context& c;
  const SoftmaxBlockDevice<T>& p;
  const int64_t n, m;
  Pairs<T, E> pairs_;
  const Multiplier multiplier_;
  const MaskedScores<T> masked_;
};

}  // namespace

namespace cuda {
template <class T>
void softmax_block(Context& c, const SoftmaxBlockDevice<T>& p) {
  with_element<T>(p.x.dtype, false, [&](auto element) { SoftmaxBlock<T, decltype(element)>(c, p).run(); });
}
}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(softmax_block, SoftmaxBlockDevice)
