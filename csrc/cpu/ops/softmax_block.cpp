// One block of a softmax whose rows and columns are spread over processes.
//
//   lse_x[i] = log sum_j e^{s_ij}      lse_y[j] = log sum_i e^{s_ij}      s_ij = scale <x_i, y_j>
//
// over the pairs of different ids. Log-sum-exps of several blocks are merged by whoever has them all; then each block
// is visited once more, with the whole normalisers: W_ij = u_i e^{s_ij - lse_x[i]} + v_j e^{s_ij - lse_y[j]} are the
// weights of its share of the gradient. A product and three, both directions included: the floor, since nobody can know
// a normaliser before the last block. Positives are not here: they are kept apart, with their rows.
#include "cpu/softmax.hpp"

namespace nearfar {
namespace {

template <class T>
class SoftmaxBlock {
  using P = Policy<T>;

 public:
  explicit SoftmaxBlock(SoftmaxBlockParams<T>& params)
      : p(params),
        n(p.x.n),
        m(p.y.n),
        o(p.x, p.y, p.normalize, false, p.dx != nullptr, p.threads),
        mask{o, -kInfinity, p.same, nullptr, p.ids_x, p.ids_y} {}

  void run() {
    const bool columns = p.same || p.lse_y;
    if (!p.dx) return columns ? values<true>() : values<false>();
    columns ? gradients<true>() : gradients<false>();
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

  template <bool COLUMNS>
  void values() {
    Buffer<LogSumExp> states(n);
    for (int64_t i = 0; i < n; ++i) states[i] = LogSumExp{};
    LseCell<T, COLUMNS> cell(o, mask, false, COLUMNS ? common_base(p.scale, p.normalize) : 0);
    cell.rows_state = states.get();
    StripPass<T, LseCell<T, COLUMNS>>(o, cell, plan()).run();
    for (int64_t j = 0; COLUMNS && j < m; ++j)
      if (p.same) {
        states[j].merge(cell.column_state(j));
      } else {
        p.lse_y[j] = cell.column_state(j).value();
      }
    for (int64_t i = 0; i < n; ++i) p.lse_x[i] = states[i].value();
  }

  /// What a base is off its normaliser, by rounding or because it is a common one, its weight makes good. An empty
  /// denominator has no weights.
  void fill(const double* lse, const double* weight, int64_t valid, double common, Buffer<T>& base, Buffer<T>& factor,
            int64_t size) const {
    for (int64_t i = 0; i < size; ++i) {
      const bool empty = i >= valid || lse[i] == -kInfinity;
      base[i] = static_cast<T>(common > 0 ? common : empty ? 0 : lse[i]);
      factor[i] = static_cast<T>(empty ? 0 : weight[i] * std::exp(static_cast<double>(base[i]) - lse[i]));
    }
  }

  template <bool COLUMNS>
  void gradients() {
    const int64_t rows = ceil_div(n, P::kStripRows) * P::kStripRows, columns = o.chunks.tiles * P::MR;
    Buffer<T> row_lse(rows), row_weight(rows), column_lse(columns), column_weight(columns);
    const double base = COLUMNS ? common_base(p.scale, p.normalize) : 0;
    fill(p.lse_x, p.weight_x, n, base, row_lse, row_weight, rows);
    if (COLUMNS)
      fill(p.same ? p.lse_x : p.lse_y, p.same ? p.weight_x : p.weight_y, m, base, column_lse, column_weight, columns);
    WeightCell<T, COLUMNS, false> cell{mask,    row_lse.get(), row_weight.get(), column_lse.get(), column_weight.get(),
                                       base > 0};
    StripPass<T, WeightCell<T, COLUMNS, false>>(o, cell, plan()).run();
    p.dscale = finish_gradients(o.x, o.y, p.scale, p.same ? 2 : 1, p.threads, p.dx, p.dy);
  }

  SoftmaxBlockParams<T>& p;
  const int64_t n, m;
  Operands<T> o;
  const Mask<T> mask;
};

}  // namespace

namespace NEARFAR_ISA {
void softmax_block(SoftmaxBlockParams<float>& p) { SoftmaxBlock<float>(p).run(); }
#if !defined(NEARFAR_BASE)  // which a level with a base takes from there
void softmax_block(SoftmaxBlockParams<double>& p) { SoftmaxBlock<double>(p).run(); }
#endif
}  // namespace NEARFAR_ISA
}  // namespace nearfar
