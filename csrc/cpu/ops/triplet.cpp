// Triplet losses of a labelled batch: mining, value and gradient; triplets are never enumerated.
//
//   hard      farthest positive and nearest negative of every anchor: two reductions over columns, nothing is kept.
//   semihard  an anchor's positives are sorted; each negative finds by binary search how many of them are nearer than
//             it, and is the closest candidate of just those. A minimum per rank, then a running minimum from the far
//             end: O(N log P) for an anchor with P positives.
//   all       the same ranks with counts and sums in place of minima: sum and number of the triplets with positive loss
//             and, per pair, the number of triplets it is active in, which is its weight in the gradient. Exact, and
//             O(N log P) though there are P N triplets. softplus has no such form: it is summed, in O(N) memory.
//
// A gradient that touches few pairs is summed pair by pair (`Pulls`), else it is a product with weights (`StripPass`).
#include "pairwise/triplet.hpp"

#include "cpu/labels.hpp"
#include "cpu/mask.hpp"

namespace nearfar {
namespace {

/// What the cells share: results per row of the batch, the gradient of its points.
template <class T>
class TripletCell {
 public:
  static constexpr bool kScores = true;
  using P = Policy<T>;

  TripletCell(TripletParams<T>& params, const Batch<T>& rows, const Operands<T>& operands)
      : p(params),
        batch(rows),
        o(operands),
        triplet{p.squared, p.soft, static_cast<T>(p.margin)},
        sums(rows.m),
        counts(rows.m) {
    for (int64_t r = 0; r < batch.m; ++r) sums[r] = 0, counts[r] = 0;
    if (!p.dx) return;
    grad = Buffer<T>(batch.m * batch.d);
    for (int64_t k = 0; k < batch.m * batch.d; ++k) grad[k] = 0;
  }

  const T* factor(int64_t) const { return nullptr; }

  TripletParams<T>& p;
  const Batch<T>& batch;
  const Operands<T>& o;
  const Triplet<T> triplet;
  Buffer<double> sums;
  Buffer<int64_t> counts;
  Buffer<T> grad;
  Pulls<T> pulls;

 protected:
  T upstream(int64_t r) const { return p.weights ? p.weights[batch.order[r]] : T(1); }
  /// |x_i - x_j|^2 from the differences, of any size.
  T square(int64_t i, int64_t j) const { return o.direct_distance(i, j, batch.points.get()); }
};

template <class T>
class HardCell : public TripletCell<T> {
  using P = Policy<T>;

 public:
  HardCell(TripletParams<T>& params, const Batch<T>& rows, const Operands<T>& operands)
      : TripletCell<T>(params, rows, operands) {
    const int64_t places = this->o.chunks.count * P::kStripRows;
    far_ = Buffer<T>(places);
    near_ = Buffer<T>(places);
    farthest_ = Buffer<int64_t>(places);
    nearest_ = Buffer<int64_t>(places);
  }

  /// Columns in ascending order, replaced only by better ones: ties go to the lower index.
  void map(const Block<T>& b) {
    const int64_t end = this->batch.m - b.column < b.columns ? this->batch.m - b.column : b.columns;
    const IntOf<T>* code = this->batch.code.get();
    for (int64_t q = 0; q < b.panels; ++q) {
      const int64_t row = b.row + q * P::NR;
      for (int64_t lane = 0; lane < P::NR; ++lane) {
        const int64_t j = row + lane - b.column;
        if (j >= 0 && j < end) b.panel(q)[j * P::NR + lane] = -1;  // nobody's own positive
      }
      for (int v = 0; v < P::kVectors; ++v) {
        const T* s = b.panel(q) + v * kLanes<T>;
        IVec<T> own;
        __builtin_memcpy(&own, code + row + v * kLanes<T>, sizeof own);
        Vec<T> far = splat<T>(-1), near = splat<T>(static_cast<T>(kInfinity));
        IVec<T> farthest = isplat<T>(-1), nearest = isplat<T>(-1);
        for (int64_t j = 0; j < end; ++j) {
          const Vec<T> square = load(s + j * P::NR);
          const IVec<T> same = own == isplat<T>(code[b.column + j]), here = isplat<T>(static_cast<IntOf<T>>(j));
          const IVec<T> farther = same & (square > far), nearer = ~same & (square < near);
          far = select(farther, square, far);
          farthest = select(farther, here, farthest);
          near = select(nearer, square, near);
          nearest = select(nearer, here, nearest);
        }
        const int64_t at = b.chunk * P::kStripRows + q * P::NR + v * kLanes<T>;
        store(&far_[at], far);
        store(&near_[at], near);
        for (int u = 0; u < kLanes<T>; ++u) {
          farthest_[at + u] = farthest[u] < 0 ? -1 : b.column + farthest[u];
          nearest_[at + u] = nearest[u] < 0 ? -1 : b.column + nearest[u];
        }
      }
    }
  }

  void close(int64_t row, int64_t rows, int64_t chunks) {
    this->pulls.open(rows, [](int64_t) { return 2; });
    parallel_for(ceil_div(rows, P::NR), this->p.threads, [&](int64_t panel, int) {
      for (int64_t r = panel * P::NR; r < (panel + 1) * P::NR && r < rows; ++r) settle(row, r, chunks);
    });
    if (this->p.dx) this->pulls.apply(row, rows, this->batch, this->grad.get(), this->p.threads);
  }

 private:
  void settle(int64_t row, int64_t r, int64_t chunks) {
    T far = -1, near = static_cast<T>(kInfinity);
    int64_t positive = -1, negative = -1;
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t at = c * P::kStripRows + r;
      if (far_[at] > far) far = far_[at], positive = farthest_[at];
      if (near_[at] < near) near = near_[at], negative = nearest_[at];
    }
    if (positive < 0 || negative < 0) return;
    const int64_t i = row + r, anchor = this->batch.order[i];
    // Measured again: the search knows distances as an expansion gives them.
    const T v_positive = this->triplet.value(this->square(i, positive));
    const T v_negative = this->triplet.value(this->square(i, negative));
    T slope;
    this->sums[i] = this->triplet.loss(v_positive, v_negative, slope);
    this->counts[i] = 1;
    slope *= this->upstream(i);
    this->pulls.add(r, positive, slope * this->triplet.pull(v_positive));
    this->pulls.add(r, negative, -slope * this->triplet.pull(v_negative));
    if (!this->p.positive) return;
    this->p.positive[anchor] = this->batch.order[positive];
    this->p.negative[anchor] = this->batch.order[negative];
  }

  Buffer<T> far_, near_;
  Buffer<int64_t> farthest_, nearest_;
};

/// Semihard and all: keeps a strip of distances, and turns each of its rows at once into triplets.
template <class T>
class RankCell : public TripletCell<T> {
  using P = Policy<T>;
  static constexpr int NR = P::NR;

 public:
  /// dense: the strip becomes weights. few: so few pairs that each can be measured again.
  RankCell(TripletParams<T>& params, const Batch<T>& rows, const Operands<T>& operands, bool dense, bool few)
      : TripletCell<T>(params, rows, operands),
        dense_(dense),
        few_(few),
        stride_(ceil_div(operands.chunks.tiles * P::MR, kLanes<T>) * kLanes<T>),
        places_(rows.largest + 1),
        blocks_(operands.chunks.count) {
    const int64_t workers = worker_count(P::kPanels, this->p.threads);
    rows_ = Buffer<T>(workers * NR * stride_);
    weights_ = Buffer<T>(this->p.soft ? workers * stride_ : 0);
    keys_ = Buffer<T>(workers * 4 * places_);
    slack_ = Buffer<double>(workers * places_);
    index_ = Buffer<int64_t>(workers * 4 * places_);
    if (!this->p.positive) return;
    Buffer<int64_t> sizes(this->p.classes);
    for (int64_t c = 0; c < this->p.classes; ++c) sizes[c] = 0;
    for (int64_t i = 0; i < this->p.x.n; ++i) ++sizes[this->p.codes[i]];
    pair_begin_ = Buffer<int64_t>(this->p.x.n);
    for (int64_t i = 0, next = 0; i < this->p.x.n; next += sizes[this->p.codes[i++]] - 1) pair_begin_[i] = next;
  }

  void map(const Block<T>& b) { blocks_[b.chunk] = b; }

  void close(int64_t row, int64_t rows, int64_t chunks) {
    const bool pairs = this->p.mining == Mining::semihard;
    if (pairs)
      this->pulls.open(
          rows, [&](int64_t r) { return this->batch.is_anchor(row + r) ? 2 * (this->batch.size(row + r) - 1) : 0; });
    parallel_for(ceil_div(rows, NR), this->p.threads, [&](int64_t panel, int worker) {
      T* distances = rows_.get() + worker * NR * stride_;
      move<false>(panel, chunks, distances);
      for (int64_t lane = 0; lane < NR; ++lane) {
        const int64_t r = panel * NR + lane, i = row + r;
        T* s = distances + lane * stride_;
        if (r < rows && this->batch.is_anchor(i)) {
          const Scratch scratch = of(worker);
          pairs ? semihard(i, r, s, scratch) : this->p.soft ? all_soft(i, s, scratch) : all_hinge(i, s, scratch);
          if (pairs && dense_) this->pulls.spread(r, s, this->batch.m);
          for (int64_t j = this->batch.m; j < stride_; ++j) s[j] = 0;
        } else {
          for (int64_t j = 0; j < stride_; ++j) s[j] = 0;
        }
      }
      if (dense_) move<true>(panel, chunks, distances);
    });
    if (pairs && this->p.dx && !dense_) this->pulls.apply(row, rows, this->batch, this->grad.get(), this->p.threads);
  }

 private:
  struct Scratch {
    T *key, *threshold, *spare, *best;
    int64_t *index, *count, *spare_index, *who;
    double* slack;
    T* weights;
  };
  Scratch of(int worker) const {
    T* k = keys_.get() + worker * 4 * places_;
    int64_t* i = index_.get() + worker * 4 * places_;
    return {k,
            k + places_,
            k + 2 * places_,
            k + 3 * places_,
            i,
            i + places_,
            i + 2 * places_,
            i + 3 * places_,
            slack_.get() + worker * places_,
            weights_.get() + (this->p.soft ? worker * stride_ : 0)};
  }

  /// One panel of the strip's blocks, [column][lane], to rows of distances, [lane][column]; kBack: from rows to blocks.
  template <bool kBack>
  void move(int64_t panel, int64_t chunks, T* rows) const {
    constexpr int L = kLanes<T>;
    for (int64_t c = 0; c < chunks; ++c) {
      const Block<T>& b = blocks_[c];
      T* block = b.panel(panel);
      int64_t j = 0;
      for (; j + L <= b.columns; j += L)
        for (int v = 0; v < P::kVectors; ++v) {
          Vec<T> lanes[L];
          T* in_block = block + j * NR + v * L;
          T* in_rows = rows + v * L * stride_ + b.column + j;
#pragma GCC unroll 16
          for (int u = 0; u < L; ++u) lanes[u] = kBack ? load(in_rows + u * stride_) : load(in_block + u * NR);
          transpose<T>(lanes);
#pragma GCC unroll 16
          for (int u = 0; u < L; ++u) store(kBack ? in_block + u * NR : in_rows + u * stride_, lanes[u]);
        }
      for (; j < b.columns; ++j)
        for (int lane = 0; lane < NR; ++lane) {
          T &in_block = block[j * NR + lane], &in_rows = rows[lane * stride_ + b.column + j];
          if (kBack) {
            in_block = in_rows;
          } else {
            in_rows = in_block;
          }
        }
    }
  }

  /// The anchor's positives, sorted by s. Returns how many.
  int64_t sort_positives(int64_t i, const T* s, const Scratch& w) const {
    int64_t count = 0;
    for (int64_t j = this->batch.begin(i); j < this->batch.end(i); ++j)
      if (j != i) w.key[count] = s[j], w.index[count++] = j;
    sort_keys(w.key, w.index, w.spare, w.spare_index, count);
    return count;
  }

  /// f(column, rank of its s among the keys) for all negatives.
  template <bool kOrEqual, class F>
  void rank_negatives(int64_t i, const T* s, const T* key, int64_t keys, F f) const {
    const int64_t range[2][2] = {{0, this->batch.begin(i)}, {this->batch.end(i), this->batch.m}};
    for (const auto& [begin, end] : range)
      for (int64_t j = begin; j < end; j += kSearches) {
        const int64_t count = end - j < kSearches ? end - j : kSearches;
        int64_t rank[kSearches];
        rank_among<kOrEqual>(key, keys, s + j, count, rank);
        for (int64_t u = 0; u < count; ++u) f(j + u, rank[u]);
      }
  }

  int64_t farthest_negative(int64_t i, const T* s) const {
    const int64_t* order = this->batch.order.get();
    int64_t farthest = -1;
    for (int64_t j = 0; j < this->batch.m; ++j)
      if (j < this->batch.begin(i) || j >= this->batch.end(i))
        if (farthest < 0 || s[j] > s[farthest] || (s[j] == s[farthest] && order[j] < order[farthest])) farthest = j;
    return farthest;
  }

  void semihard(int64_t i, int64_t r, const T* s, const Scratch& w) {
    const int64_t* order = this->batch.order.get();
    const int64_t positives = sort_positives(i, s, w);
    for (int64_t k = 0; k <= positives; ++k) w.best[k] = static_cast<T>(kInfinity), w.who[k] = -1;
    auto improve = [&](T value, int64_t j, T& best, int64_t& who) {
      if (value < best || (value == best && who >= 0 && order[j] < order[who])) best = value, who = j;
    };
    rank_negatives<false>(i, s, w.key, positives,
                          [&](int64_t j, int64_t rank) { improve(s[j], j, w.best[rank], w.who[rank]); });
    const int64_t farthest = w.who[positives] >= 0 ? -1 : farthest_negative(i, s);
    // From the farthest positive on, the closest negative of a higher rank only comes nearer.
    T near = static_cast<T>(kInfinity), v_negative = 0, weight = 0;
    int64_t nearest = -1, last = -1;
    const T up = this->upstream(i);
    double sum = 0;
    for (int64_t k = positives - 1; k >= 0; --k) {
      if (w.who[k + 1] >= 0) improve(w.best[k + 1], w.who[k + 1], near, nearest);
      const int64_t positive = w.index[k], negative = nearest >= 0 ? nearest : farthest;
      if (negative != last) {
        if (last >= 0) this->pulls.add(r, last, weight);
        v_negative = this->triplet.value(few_ ? this->square(i, negative) : s[negative]);
        weight = 0;
        last = negative;
      }
      const T v_positive = this->triplet.value(few_ ? this->square(i, positive) : w.key[k]);
      T slope;
      sum += this->triplet.loss(v_positive, v_negative, slope);
      this->pulls.add(r, positive, slope * up * this->triplet.pull(v_positive));
      weight -= slope * up * this->triplet.pull(v_negative);
      if (this->p.positive) {
        const int64_t place = pair_begin_[order[i]] + positive - this->batch.begin(i) - (positive > i);
        this->p.positive[place] = order[positive];
        this->p.negative[place] = order[negative];
      }
    }
    this->pulls.add(r, last, weight);
    this->sums[i] = sum;
    this->counts[i] = positives;
  }

  /// s becomes v, in place.
  void to_values(T* s) const {
    if (this->p.squared) return;
    for (int64_t j = 0; j < stride_; j += kLanes<T>) store(s + j, sqrt(load(s + j)));
  }

  /// A pair's weight in the gradient from the number (or slopes) of its triplets, in place of its value.
  void weigh(T& value, double slope, T up) const { value = static_cast<T>(slope) * up * this->triplet.pull(value); }

  void all_hinge(int64_t i, T* s, const Scratch& w) {
    to_values(s);
    const int64_t positives = sort_positives(i, s, w);
    for (int64_t k = 0; k < positives; ++k) {
      w.threshold[k] = w.key[k] + this->triplet.margin;  // a negative nearer than this has positive loss
      w.count[k] = 0;
      w.slack[k] = 0;
    }
    const T up = this->upstream(i), last = w.threshold[positives - 1];
    double total = 0;
    int64_t triplets = 0;
    // Sums are of (last - v): all terms are positive, and small where the loss is.
    rank_negatives<true>(i, s, w.threshold, positives, [&](int64_t j, int64_t rank) {
      if (rank < positives) ++w.count[rank], w.slack[rank] += static_cast<double>(last) - static_cast<double>(s[j]);
      if (this->p.dx) weigh(s[j], static_cast<double>(rank - positives), up);
    });
    int64_t active = 0;
    double slack = 0;
    for (int64_t k = 0; k < positives; ++k) {
      active += w.count[k];
      slack += w.slack[k];
      triplets += active;
      total += slack - static_cast<double>(active) * (static_cast<double>(last) - static_cast<double>(w.threshold[k]));
      if (this->p.dx) weigh(s[w.index[k]], static_cast<double>(active), up);
    }
    s[i] = 0;
    this->sums[i] = total;
    this->counts[i] = triplets;
  }

  void all_soft(int64_t i, T* s, const Scratch& w) {
    to_values(s);
    const int64_t begin = this->batch.begin(i), end = this->batch.end(i), m = this->batch.m;
    int64_t positives = 0;
    for (int64_t j = begin; j < end; ++j)
      if (j != i) w.key[positives] = s[j], w.index[positives++] = j;
    // Infinitely far: no loss, no slope.
    for (int64_t j = begin; j < end; ++j) s[j] = static_cast<T>(kInfinity);
    for (int64_t j = m; j < stride_; ++j) s[j] = static_cast<T>(kInfinity);
    for (int64_t j = 0; j < stride_; ++j) w.weights[j] = 0;
    const T up = this->upstream(i);
    double total = 0;
    for (int64_t k = 0; k < positives; ++k) {
      const Vec<T> own = splat<T>(w.key[k]), zero = Vec<T>{};
      Vec<T> loss = zero, slopes = zero;
      for (int64_t j = 0; j < stride_; j += kLanes<T>) {
        const Vec<T> gap = own - load(s + j), e = exp_flush(vmin(gap, -gap)), share = T(1) / (e + T(1));
        loss += vmax(gap, zero) + log1p(e);
        const Vec<T> slope = select(gap > zero, share, e * share);
        slopes += slope;
        store(w.weights + j, load(w.weights + j) + slope);
      }
      total += static_cast<double>(hsum<T>(loss));
      w.best[k] = hsum<T>(slopes);
    }
    this->sums[i] = total;
    this->counts[i] = positives * (m - (end - begin));
    if (!this->p.dx) return;
    for (int64_t j = 0; j < m; ++j)
      if (j < begin || j >= end) weigh(s[j], -static_cast<double>(w.weights[j]), up);
    s[i] = 0;
    for (int64_t k = 0; k < positives; ++k) {
      s[w.index[k]] = w.key[k];
      weigh(s[w.index[k]], static_cast<double>(w.best[k]), up);
    }
  }

  const bool dense_, few_;
  const int64_t stride_, places_;
  Buffer<Block<T>> blocks_;  // of the strip, by chunk
  Buffer<T> rows_, weights_, keys_;
  Buffer<int64_t> index_, pair_begin_;
  Buffer<double> slack_;
};

/// From the sums and the gradient of the batch's rows to those of the rows of x.
template <class T>
void finish(TripletParams<T>& p, TripletCell<T>& cell, const T* more) {
  const Batch<T>& batch = cell.batch;
  const int64_t d = batch.d;
  p.value_sum = 0;
  p.count = 0;
  for (int64_t i = 0; i < p.x.n; ++i) {
    p.value[i] = static_cast<T>(kInfinity - kInfinity);  // a row with NaN or inf
    if (!batch.finite(i)) p.value_sum = p.value[i];
  }
  for (int64_t r = 0; r < batch.m; ++r) {
    p.value[batch.order[r]] = static_cast<T>(cell.sums[r]);
    p.value_sum += cell.sums[r];
    p.count += cell.counts[r];
  }
  const double over = p.mean && p.count ? static_cast<double>(p.count) : 1;
  p.value_sum /= over;
  if (!p.dx) return;
  for (int64_t i = 0; i < p.x.n; ++i)
    if (!batch.finite(i))
      for (int64_t k = 0; k < d; ++k) p.dx[i * d + k] = p.value[i];
  const T scale = static_cast<T>(1 / over);
  parallel_for(ceil_div(batch.m, Source<T>::kRowsPerTask), p.threads, [&](int64_t task, int) {
    for (int64_t r = task * Source<T>::kRowsPerTask; r < (task + 1) * Source<T>::kRowsPerTask && r < batch.m; ++r) {
      T* g = p.dx + batch.order[r] * d;
      for (int64_t k = 0; k < d; ++k) g[k] = scale * (cell.grad[r * d + k] + (more ? more[r * d + k] : T(0)));
      normalize_backward(batch.source, batch.order[r], batch.points.get() + r * d, g);
    }
  });
}

template <class T>
void run(TripletParams<T>& p) {
  const bool hard = p.mining == Mining::hard;
  const Batch<T> batch(p.x, p.codes, p.classes, p.normalize, !hard, p.threads);
  // A pair by itself costs as much as some thirty in a product.
  constexpr int64_t kFew = 32;
  const bool few = p.mining == Mining::semihard && batch.pairs() <= batch.m * batch.m / kFew;
  const bool dense = p.dx && !hard && !few;
  const Operands<T> o(batch.rows(), batch.rows(), false, true, dense, p.threads);
  StripPlan<T> plan;
  plan.threads = p.threads;
  if (hard) {
    HardCell<T> cell(p, batch, o);
    StripPass<T, HardCell<T>>(o, cell, plan).run();
    return finish<T>(p, cell, nullptr);
  }
  RankCell<T> cell(p, batch, o, dense, few);
  plan.two_phase = true;
  Buffer<T> dy;
  if (dense) {
    dy = Buffer<T>(batch.m * batch.d);
    for (int64_t k = 0; k < batch.m * batch.d; ++k) dy[k] = 0;
    plan.dx = cell.grad.get();
    plan.dy = dy.get();
  }
  StripPass<T, RankCell<T>>(o, cell, plan).run();
  finish<T>(p, cell, dense ? dy.get() : nullptr);
}

}  // namespace

namespace NEARFAR_ISA {
void triplet(TripletParams<float>& p) { run(p); }
void triplet(TripletParams<double>& p) { run(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
