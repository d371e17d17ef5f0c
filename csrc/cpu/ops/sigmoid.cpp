// Sigmoid loss over pairs: SigLIP.
//
//   loss_i = softplus(-l_ii) + sum_{j != i} softplus(l_ij)        l_ij = scale <x_i, y_j> + bias
//
// No normaliser: dloss_i/dl_ij = sigmoid(l_ij) is known with the score, so value and both products of the gradient come
// from one pass, three matrix products in all. The diagonal is left out of the blocks (its score becomes -inf, whose
// softplus and sigmoid are 0) and computed from its two rows: softplus(l) - l would lose the digits of a good match.
// A block of a batch that is spread over processes has no matches unless it is on the diagonal.
#include "cpu/mask.hpp"

namespace nearfar {
namespace {

/// The losses of rows; with GRADIENT, scores become weights.
template <class T, bool GRADIENT>
struct SigmoidCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;
  static constexpr int64_t kRun = 16;  // columns that are summed before they join the rest: equal terms round alike

  void map(const Block<T>& b) {
    mask.apply(b);
    const Vec<T> shift = splat<T>(bias);
    for (int64_t p = 0; p < b.panels; ++p)
      for (int v = 0; v < P::kVectors; ++v) {
        T* s = b.panel(p) + v * kLanes<T>;
        const int64_t lane = p * P::NR + v * kLanes<T>;
        const Vec<T> upstream = load(&row_weight[b.row + lane]);
        Vec<T> loss = Vec<T>{}, slope = Vec<T>{};
        for (int64_t begin = 0; begin < b.columns; begin += kRun) {
          const int64_t end = begin + kRun < b.columns ? begin + kRun : b.columns;
          Vec<T> run = Vec<T>{}, slope_run = Vec<T>{};
          for (int64_t j = begin; j < end; ++j) {
            const SoftplusSigmoid<T> pair = softplus_sigmoid(load(s + j * P::NR) + shift);
            run += pair.softplus;
            if (!GRADIENT) continue;
            const Vec<T> weight = pair.sigmoid * upstream;
            slope_run += weight;
            store(s + j * P::NR, weight);
          }
          loss += run;
          slope += slope_run;
        }
        store(&sums[b.chunk * P::kStripRows + lane], loss);
        if (GRADIENT) slopes[b.chunk] += static_cast<double>(hsum<T>(slope));
      }
  }

  void close(int64_t row, int64_t rows, int64_t chunks) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < chunks; ++c) losses[row + i] += static_cast<double>(sums[c * P::kStripRows + i]);
  }
  const T* factor(int64_t) const { return nullptr; }

  const Mask<T>& mask;
  T bias;
  const T* row_weight;    // upstream, padded to whole strips
  double* losses;         // (n)
  Buffer<T> sums;         // per chunk and row of the strip
  Buffer<double> slopes;  // per chunk
};

template <class T>
class Sigmoid {
  using P = Policy<T>;

 public:
  explicit Sigmoid(SigmoidParams<T>& params)
      : p(params),
        n(p.x.n),
        d(p.x.d),
        o(p.x, p.y, p.normalize, false, p.dx != nullptr, p.threads),
        mask{o, -kInfinity, false} {
    const int64_t rows = ceil_div(n, P::kStripRows) * P::kStripRows;
    row_weight_ = Buffer<T>(rows);
    for (int64_t i = 0; i < rows; ++i)
      row_weight_[i] = i < n ? (p.weights ? p.weights[i] : static_cast<T>(p.weight)) : T(0);
    losses_ = Buffer<double>(n);
    diagonal_ = Buffer<double>(n);
    for (int64_t i = 0; i < n; ++i) losses_[i] = diagonal_[i] = 0;
    if (!p.matched) return;
    own_ = Buffer<int64_t>(n);
    for (int64_t i = 0; i < n; ++i) own_[i] = i;
    mask.partner = own_.get();
  }

  void run() {
    if (p.matched) matches();
    p.dx ? pass<true>() : pass<false>();
    p.loss_sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      p.loss[i] = static_cast<T>(losses_[i]);
      p.loss_sum += losses_[i];
    }
    if (p.dx) finish();
  }

 private:
  /// The diagonal: softplus(-l_ii), and the slope -sigmoid(-l_ii).
  void matches() {
    parallel_for(o.x.tasks(), p.threads, [&](int64_t task, int) {
      Buffer<T> rows(2 * d);
      T *own = rows.get(), *other = rows.get() + d;
      for (int64_t i = task * Source<T>::kRowsPerTask; i < o.x.end(task); ++i) {
        o.x.get(i, own);
        o.y.get(i, other);
        const double l = p.scale * Source<T>::dot(own, other, d) + p.bias, e = std::exp(-std::fabs(l));
        losses_[i] = std::log1p(e) - (l < 0 ? l : 0);
        diagonal_[i] = -(l < 0 ? 1 : e) / (1 + e);
      }
    });
  }

  template <bool GRADIENT>
  void pass() {
    const int64_t chunks = o.chunks.count;
    SigmoidCell<T, GRADIENT> cell{mask,
                                  static_cast<T>(p.bias),
                                  row_weight_.get(),
                                  losses_.get(),
                                  Buffer<T>(chunks * P::kStripRows),
                                  Buffer<double>(chunks)};
    for (int64_t c = 0; c < chunks; ++c) cell.slopes[c] = 0;
    StripPlan<T> plan;
    plan.scale = static_cast<T>(p.scale);
    plan.threads = p.threads;
    if (GRADIENT) plan.dx = p.dx, plan.dy = p.dy;
    StripPass<T, SigmoidCell<T, GRADIENT>>(o, cell, plan).run();
    p.dbias = 0;
    for (int64_t c = 0; c < chunks; ++c) p.dbias += cell.slopes[c];
  }

  /// Of gradients what is not in the blocks: the diagonal, scale, normalisation.
  void finish() {
    if (p.matched) add_matches();
    p.dscale = finish_gradients(o.x, o.y, p.scale, 1, p.threads, p.dx, p.dy);
    for (int64_t i = 0; i < n; ++i) p.dbias += diagonal_[i] * static_cast<double>(row_weight_[i]);
  }

  void add_matches() {
    parallel_for(o.x.tasks(), p.threads, [&](int64_t task, int) {
      Buffer<T> rows(2 * d);
      T *own = rows.get(), *other = rows.get() + d;
      for (int64_t i = task * Source<T>::kRowsPerTask; i < o.x.end(task); ++i) {
        o.x.get(i, own);
        o.y.get(i, other);
        const T w = static_cast<T>(diagonal_[i] * static_cast<double>(row_weight_[i]));
        T* dx = p.dx + i * d;
        for (int64_t k = 0; k < d; ++k) dx[k] += w * other[k];
        if (T* dy = p.dy ? p.dy + i * d : nullptr)
          for (int64_t k = 0; k < d; ++k) dy[k] += w * own[k];
      }
    });
  }

  SigmoidParams<T>& p;
  const int64_t n, d;
  Operands<T> o;
  Mask<T> mask;
  Buffer<T> row_weight_;
  Buffer<int64_t> own_;
  Buffer<double> losses_, diagonal_;
};

}  // namespace

namespace NEARFAR_ISA {
void sigmoid(SigmoidParams<float>& p) { Sigmoid<float>(p).run(); }
#if !defined(NEARFAR_BASE)  // which a level with a base takes from there
void sigmoid(SigmoidParams<double>& p) { Sigmoid<double>(p).run(); }
#endif
}  // namespace NEARFAR_ISA
}  // namespace nearfar
