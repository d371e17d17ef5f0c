// The strip pass: all pairs, a strip of rows of x at a time, with up to two products per block of weights.
//
//   for each strip of 128 rows of x:
//     for each chunk of columns (in parallel):      scores -> cell.map: weights W, states of rows and columns
//     cell.close: what is known now that the strip has seen every column (its log-sum-exp)
//     for each chunk of columns (in parallel):      dY[chunk] += W^T X,   dX partial of the chunk's group += W Y
//     dX of the strip = sum of the groups' partials, in order
//
// A chunk owns its rows of dY and its column states, a group of chunks owns its partial of dX: nothing is shared,
// nothing is copied per thread, and every sum has an order that the shape alone decides. Where weights need nothing
// from the rest of the strip (one phase), both products follow the scores of a chunk at once and no strip of weights is
// stored.
#pragma once

#include "cpu/operands.hpp"

namespace nearfar {
namespace {

/// A block of scores or weights: `panels` panels of NR lanes against columns [column, column + columns).
/// Element (p, j, lane) is data[p * panel_stride + j * NR + lane]. Columns past the last one are padding.
template <class T>
struct Block {
  int64_t chunk, group;
  int64_t row;  // first row of x
  int64_t panels;
  int64_t column;  // first row of y
  int64_t columns;
  T* data;
  int64_t panel_stride;
  const T* squares;  // of the strip's rows, for distances
  Places* near;      // gradients of distances: where pairs are close, see Operands; else null
  T* panel(int64_t p) const { return data + p * panel_stride; }
  /// Columns up to the last row of panel p: of a triangle, all that have pairs.
  int64_t columns_below(int64_t p) const {
    const int64_t most = row + (p + 1) * Policy<T>::NR - column;
    return most < 0 ? 0 : most < columns ? most : columns;
  }
};

template <class T>
struct StripPlan {
  bool triangle = false;   // y is x and only pairs with column < row are wanted
  bool two_phase = false;  // the strip is kept: weights, or their factors, are known after cell.close only
  T scale = 1;             // on x, for the scores only (of halves on their scores)
  T* dx = nullptr;         // (n, d) and (m, d), added to; null if not wanted. For dot products dy may be dx (y is x);
  T* dy = nullptr;         // for distances it may not, because dy turns its sign at the end
  T* kept = nullptr;       // of `kept_size`, for blocks: what cell.map leaves there, the next pass finds
  bool scored = false;     // no scores are needed: a pass before this one left them in `kept`, or weights are the same
                           // whatever the scores are
  int64_t depth = 0;       // of the widest of passes that go in step, if there are others
  int threads = 1;
};

template <class T, class Cell>
class StripPass {
  using P = Policy<T>;
  static constexpr int NR = P::NR;

 public:
  StripPass(const Operands<T>& operands, Cell& cell, const StripPlan<T>& plan)
      : o_(operands), cell_(cell), plan_(plan), n_(o_.x.n()), d_(o_.d), products_(plan.dx || plan.dy) {
    const Chunks& c = o_.chunks;
    panel_stride_ = c.tiles_each * P::MR * NR;
    depth_ = ceil_div(d_, P::MR) * P::MR;
    depth_panels_ = ceil_div(d_, NR);
    // Groups bound the partials of dX to about 8 MB.
    const int64_t partial = P::kStripRows * depth_;
    const int64_t widest = depth_ < plan.depth ? plan.depth : depth_;
    int64_t most = (int64_t(8) << 20) / (P::kStripRows * widest * static_cast<int64_t>(sizeof(T)) + 1);
    most = most < 4 ? 4 : most > 64 ? 64 : most;
    chunks_each_ = c.count ? ceil_div(c.count, most) : 1;
    groups_ = ceil_div(c.count, chunks_each_);
    workers_ = worker_count(groups_, plan.threads);

    row_stride_ = halves() ? Halves::row_stride(d_) : padded<T>(d_);
    rows_ = Buffer<T>(P::kStripRows * row_stride_);
    panels_ = Buffer<T>(P::kStripRows * d_);
    squares_ = Buffer<T>(P::kStripRows);
    const int64_t block = P::kPanels * panel_stride_, slots = plan.two_phase ? c.count : workers_;
    if (!plan.kept) blocks_ = Buffer<T>(block * slots);
    if (products_) {
      x_rows_ = Buffer<T>(depth_panels_ * P::kStripRows * NR);
      partial_ = Buffer<T>(groups_ * partial);
      if (plan.two_phase && !halves()) scaled_ = Buffer<T>(workers_ * depth_panels_ * P::kStripRows * NR);
      if (halves()) rounded_ = Buffer<T>(workers_ * block);
      if (o_.distance()) {
        near_ = Buffer<int32_t>(slots * block);
        places_ = Buffer<Places>(slots);
        for (int64_t s = 0; s < slots; ++s) places_[s] = Places{near_.get() + s * block};
      }
      if (sums()) {
        row_sums_ = Buffer<T>(groups_ * P::kStripRows);
        column_sums_ = Buffer<double>(o_.y.n());
        for (int64_t j = 0; j < o_.y.n(); ++j) column_sums_[j] = 0;
      }
    }
  }

  /// What `kept` must have room for.
  static int64_t kept_size(const Operands<T>& o, bool triangle) {
    int64_t blocks = 0;
    for (int64_t row = 0; row < o.x.n(); row += P::kStripRows)
      blocks += chunks_of(o, triangle, row + P::kStripRows < o.x.n() ? row + P::kStripRows : o.x.n());
    return blocks * P::kPanels * o.chunks.tiles_each * P::MR * NR;
  }

  void run() {
    for (int64_t row = 0; row < n_; row += P::kStripRows) strip(row);
    if (plan_.dy && sums()) finish_columns();
  }

 private:
  friend struct InStep;

  /// Of a strip that ends before row `end`: a triangle needs columns below its last row only.
  static int64_t chunks_of(const Operands<T>& o, bool triangle, int64_t end) {
    const int64_t count = triangle ? ceil_div(ceil_div(end, P::MR), o.chunks.tiles_each) : o.chunks.count;
    return count < o.chunks.count ? count : o.chunks.count;
  }

  bool halves() const { return kHalves<T> && o_.halves(); }
  /// Whether sums of weights, or of what rounding took from them, enter gradients.
  bool sums() const { return o_.distance() || halves(); }

  void strip(int64_t row) {
    const int64_t rows = n_ - row < P::kStripRows ? n_ - row : P::kStripRows;
    const int64_t panels = ceil_div(rows, NR), count = chunks_of(o_, plan_.triangle, row + rows);
    const int64_t groups = ceil_div(count, chunks_each_);

    parallel_for(panels, plan_.threads, [&](int64_t p, int) { pack_rows(row, p); });
    parallel_for(groups, plan_.threads, [&](int64_t group, int worker) {
      for_chunks(group, count, [&](int64_t chunk) {
        const Block<T> block = scores(row, panels, chunk, group, worker);
        cell_.map(block);
        if (products_ && !plan_.two_phase) multiply_weights(block, nullptr, worker);
      });
    });
    cell_.close(row, rows, count);
    if (plan_.two_phase && products_)
      parallel_for(groups, plan_.threads, [&](int64_t group, int worker) {
        for_chunks(group, count, [&](int64_t chunk) {
          multiply_weights(view(row, panels, chunk, group, worker), cell_.factor(chunk), worker);
        });
      });
    if (plan_.dx && groups > 0)
      parallel_for(panels, plan_.threads, [&](int64_t p, int) { merge(row, rows, p, groups); });
    blocks_before_ += count;
  }

  template <class F>
  void for_chunks(int64_t group, int64_t count, F f) {
    const int64_t last = (group + 1) * chunks_each_ < count ? (group + 1) * chunks_each_ : count;
    for (int64_t chunk = group * chunks_each_; chunk < last; ++chunk) f(chunk);
  }

  void pack_rows(int64_t row, int64_t p) {
    T* rows = rows_.get() + p * NR * row_stride_;
    if constexpr (kHalves<T>)
      if (halves())
        return o_.halves().pack_panel(o_.x, row + p * NR, rows, panels_.get() + p * NR * d_, squares_.get() + p * NR,
                                      products_ ? x_rows_.get() + p * NR / 2 * NR : nullptr, P::kStripRows / 2 * NR);
    o_.pack_panel(row + p * NR, plan_.scale, rows, panels_.get() + p * NR * d_, squares_.get() + p * NR);
    if (!products_) return;
    for (int64_t panel = 0; panel < depth_panels_; ++panel)
      for (int64_t r = 0; r < NR; ++r) {
        T* out = x_rows_.get() + (panel * P::kStripRows + p * NR + r) * NR;
        for (int64_t k = 0; k < NR; ++k) out[k] = panel * NR + k < d_ ? rows[r * row_stride_ + panel * NR + k] : T(0);
      }
  }

  Block<T> view(int64_t row, int64_t panels, int64_t chunk, int64_t group, int worker) const {
    const Chunks& c = o_.chunks;
    const int64_t t0 = c.tile_begin(chunk), t1 = c.tile_end(chunk);
    const int64_t slot = plan_.two_phase ? chunk : worker, block = P::kPanels * panel_stride_;
    T* data = plan_.kept ? plan_.kept + (blocks_before_ + chunk) * block : blocks_.get() + slot * block;
    Places* near = products_ && o_.distance() ? const_cast<Places*>(&places_[slot]) : nullptr;
    return {chunk, group, row, panels, t0 * P::MR, (t1 - t0) * P::MR, data, panel_stride_, squares_.get(), near};
  }

  Block<T> scores(int64_t row, int64_t panels, int64_t chunk, int64_t group, int worker) {
    const Block<T> block = view(row, panels, chunk, group, worker);
    if (block.near) block.near->count = 0;
    if (Cell::kScores && !plan_.scored)
      for (int64_t p = 0; p < panels; ++p) {
        if (block.near) block.near->base = p * panel_stride_;
        if constexpr (kHalves<T>)
          if (halves()) {
            o_.halves().block(o_.chunks.tile_begin(chunk), o_.chunks.tile_end(chunk), panels_.get() + p * NR * d_,
                              squares_.get() + p * NR, plan_.scale, block.panel(p));
            continue;
          }
        o_.block(o_.chunks.tile_begin(chunk), o_.chunks.tile_end(chunk), row + p * NR, panels_.get() + p * NR * d_,
                 squares_.get() + p * NR, block.panel(p), block.near);
      }
    return block;
  }

  /// The partial of a group, before its first chunk adds to it.
  void clear_partial(const Block<T>& w) {
    T* partial = partial_.get() + w.group * P::kStripRows * depth_;
    for (int64_t k = 0; k < w.panels * NR * depth_; ++k) partial[k] = 0;
  }

  /// Both products of one block of weights.
  void multiply_weights(const Block<T>& w, const T* factor, int worker) {
    // The first product of a group writes its partial, the others add to it.
    bool add = w.chunk % chunks_each_ != 0;
    if (sums() && !add)
      for (int64_t k = 0; k < P::kStripRows; ++k) row_sums_[w.group * P::kStripRows + k] = 0;
    if (const bool near = w.near && w.near->count; near || o_.by_coordinates()) {
      if (!add) clear_partial(w);
      add = true;
      if (near) take_near(w);
    }
    if (o_.by_coordinates()) return with_coordinate_score(o_.kind(), [&](auto score) { multiply_slopes(w, score); });
    const int64_t t0 = w.column / P::MR;
    if constexpr (kHalves<T>)
      if (const Halves& halves = o_.halves()) {
        T *down = rounded_.get() + worker * P::kPanels * panel_stride_, *along = down + P::kPanels * panel_stride_ / 2;
        halves.round_weights(w, o_.y.n(), factor, squares_.get(), down, plan_.dy ? along : nullptr,
                             row_sums_.get() + w.group * P::kStripRows, column_sums_.get());
        if (plan_.dx) add_dx<HalvesDot>(w, halves.columns(t0), halves.column_stride(), down, factor, add);
        if (plan_.dy) add_dy<HalvesDot>(w, along, x_rows_.get());
        return;
      }
    if (plan_.dx) add_dx<Dot>(w, o_.tile(t0), o_.tile_stride, w.data, factor, add);
    if (plan_.dy) add_dy<Dot>(w, w.data, factor ? scale_rows(factor, w.panels, worker) : x_rows_.get());
    if (o_.distance()) add_sums(w);
  }

  /// The partial of the block's group (+)= y^T W times the factors of rows.
  template <class Score>
  void add_dx(const Block<T>& w, const T* y_tiles, int64_t tile_stride, const T* weights, const T* factor, bool add) {
    const int64_t tiles = w.columns / P::MR;
    for (int64_t p = 0; p < w.panels; ++p, weights += panel_stride_ / kPerLane<Score>) {
      T* out = partial_.get() + (w.group * P::kStripRows + p * NR) * depth_;
      const T* lanes = factor ? factor + p * NR : nullptr;
      const T* y = y_tiles;
      int64_t k = 0;
      for (; d_ - k > 2 * P::MR / 3; k += P::MR, y += P::MR * P::MR / kPerLane<Score>)
        product_dx<Score, T, P::MR>(tiles, y, tile_stride, weights, lanes, add, out + k * NR);
      if (d_ - k > P::MR / 3)
        product_dx<Score, T, 2 * P::MR / 3>(tiles, y, tile_stride, weights, lanes, add, out + k * NR);
      else if (d_ > k)
        product_dx<Score, T, P::MR / 3>(tiles, y, tile_stride, weights, lanes, add, out + k * NR);
    }
  }

  /// dY of the block's columns += W^T x.
  template <class Score>
  void add_dy(const Block<T>& w, const T* weights, const T* x_rows) {
    constexpr int kPer = kPerLane<Score>;
    constexpr int64_t kPanelsAtOnce = 8;  // of coordinates: their rows of x stay in L2, and rows of dY are read along
    const int64_t tiles = w.columns / P::MR;
    for (int64_t first = 0; first < depth_panels_; first += kPanelsAtOnce)
      for (int64_t t = 0; t < tiles; ++t) {
        const int64_t column = w.column + t * P::MR, rows = o_.y.n() - column;
        const T* tile = weights + t * P::MR * (NR / kPer);
        for (int64_t panel = first; panel < first + kPanelsAtOnce && panel < depth_panels_; ++panel) {
          const int64_t lanes = d_ - panel * NR;
          const T* own = x_rows + panel * (P::kStripRows / kPer) * NR;
          T* out = plan_.dy + column * d_ + panel * NR;
          if (lanes > kLanes<T>)
            product_dy<Score, T, 2>(w.panels, tile, panel_stride_ / kPer, own, rows, lanes, out, d_);
          else
            product_dy<Score, T, 1>(w.panels, tile, panel_stride_ / kPer, own, rows, lanes, out, d_);
        }
      }
  }

  /// The same where the gradient is no product: dx_i += w_ij by_x(x_i, y_j), dy_j += w_ij by_y(x_i, y_j).
  template <class Score>
  void multiply_slopes(const Block<T>& w, Score) {
    const int64_t t0 = w.column / P::MR, tiles = w.columns / P::MR;
    for (int64_t t = 0; t < tiles; ++t)
      for (int64_t k = 0; k < d_; ++k) {
        const T* y = o_.tile(t0 + t) + k * P::MR;
        Vec<T> down[P::MR] = {};
        for (int64_t p = 0; p < w.panels; ++p)
          for (int v = 0; v < P::kVectors; ++v) {
            T* out = partial_.get() + (w.group * P::kStripRows + p * NR) * depth_ + k * NR + v * kLanes<T>;
            const Vec<T> x = load(panels_.get() + (p * d_ + k) * NR + v * kLanes<T>);
            const T* weights = w.panel(p) + t * P::MR * NR + v * kLanes<T>;
            Vec<T> sum = Vec<T>{};
#pragma GCC unroll 12
            for (int r = 0; r < P::MR; ++r) {
              const Vec<T> weight = load(weights + r * NR);
              Vec<T> by_x, by_y;
              Score::slopes(x, splat<T>(y[r]), by_x, by_y);
              sum += weight * by_x;
              down[r] += weight * by_y;
            }
            store(out, load(out) + sum);
          }
        for (int64_t r = 0; plan_.dy && r < P::MR && w.column + t * P::MR + r < o_.y.n(); ++r)
          plan_.dy[(w.column + t * P::MR + r) * d_ + k] += hsum<T>(down[r]);
      }
  }

  /// Near pairs leave the products, where x_i and y_j would cancel, and enter as w_ij (x_i - y_j) of the rows as given.
  __attribute__((noinline)) void take_near(const Block<T>& w) {
    Buffer<T> rows(2 * d_);
    for (int64_t k = 0; k < w.near->count; ++k) {
      const int64_t place = w.near->list[k], p = place / panel_stride_, within = place % panel_stride_;
      const int64_t lane = within % NR, j = w.column + within / NR;
      const T weight = w.data[place];
      w.data[place] = 0;
      if (weight == 0) continue;
      const T *a = o_.x.view(w.row + p * NR + lane, rows.get()), *b = o_.y.view(j, rows.get() + d_);
      T* dx = partial_.get() + (w.group * P::kStripRows + p * NR) * depth_ + lane;
      T* dy = plan_.dy ? plan_.dy + j * d_ : nullptr;
      // Both are turned in sign later.
      for (int64_t c = 0; c < d_; ++c) {
        const T pull = weight * (a[c] - b[c]);
        dx[c * NR] -= pull;
        if (dy) dy[c] += pull;
      }
    }
  }

  const T* scale_rows(const T* factor, int64_t panels, int worker) {
    T* out = scaled_.get() + worker * depth_panels_ * P::kStripRows * NR;
    for (int64_t panel = 0; panel < depth_panels_; ++panel)
      for (int64_t i = 0; i < panels * NR; ++i) {
        const int64_t at = (panel * P::kStripRows + i) * NR;
        for (int v = 0; v < P::kVectors; ++v)
          store(out + at + v * kLanes<T>, load(x_rows_.get() + at + v * kLanes<T>) * splat<T>(factor[i]));
      }
    return out;
  }

  /// Row and column sums of W: for distances, dx_i = (sum_j w_ij) x_i - sum_j w_ij y_j.
  void add_sums(const Block<T>& w) {
    for (int64_t p = 0; p < w.panels; ++p) {
      T* sums = row_sums_.get() + w.group * P::kStripRows + p * NR;
      for (int v = 0; v < P::kVectors; ++v) {
        Vec<T> sum = Vec<T>{};
        for (int64_t j = 0; j < w.columns; ++j) sum += load(w.panel(p) + j * NR + v * kLanes<T>);
        store(sums + v * kLanes<T>, load(sums + v * kLanes<T>) + sum);
      }
    }
    for (int64_t j = 0; plan_.dy && j < w.columns && w.column + j < o_.y.n(); ++j) {
      Vec<T> sum = Vec<T>{};
      for (int64_t p = 0; p < w.panels; ++p)
        for (int v = 0; v < P::kVectors; ++v) sum += load(w.panel(p) + j * NR + v * kLanes<T>);
      column_sums_[w.column + j] += static_cast<double>(hsum<T>(sum));
    }
  }

  /// dX of one panel: the groups' partials in order, from lanes to rows.
  void merge(int64_t row, int64_t rows, int64_t p, int64_t groups) {
    T* sum = partial_.get() + p * NR * depth_;
    const int64_t size = NR * d_;
    for (int64_t g = 1; g < groups; ++g) {
      const T* other = partial_.get() + (g * P::kStripRows + p * NR) * depth_;
      for (int64_t k = 0; k < size; ++k) sum[k] += other[k];
    }
    for (int64_t lane = 0; lane < NR && p * NR + lane < rows; ++lane) {
      T* out = plan_.dx + (row + p * NR + lane) * d_;
      T total = 0;
      for (int64_t g = 0; sums() && g < groups; ++g) total += row_sums_[g * P::kStripRows + p * NR + lane];
      if (!o_.distance()) {
        for (int64_t k = 0; k < d_; ++k) out[k] += sum[k * NR + lane];
        for (int64_t k = 0; halves() && k < d_; ++k) out[k] += total * static_cast<T>(o_.halves().mean_y()[k]);
        continue;
      }
      const T* own = rows_.get() + (p * NR + lane) * row_stride_;
      for (int64_t k = 0; k < d_; ++k) out[k] += total * own[k] - sum[k * NR + lane];
    }
  }

  /// For distances dY holds W^T X so far: turn its sign and add the column sums times the rows. Of halves it lacks the
  /// column sums times the mean of x.
  void finish_columns() {
    parallel_for(o_.y.tasks(), plan_.threads, [&](int64_t task, int) {
      Buffer<T> own(d_);
      for (int64_t j = task * Source<T>::kRowsPerTask; j < o_.y.end(task); ++j) {
        T* out = plan_.dy + j * d_;
        const T sum = static_cast<T>(column_sums_[j]);
        if (halves()) {
          for (int64_t k = 0; k < d_; ++k) out[k] += sum * static_cast<T>(o_.halves().mean_x()[k]);
          continue;
        }
        o_.y.get_packed(j, own.get());
        for (int64_t k = 0; k < d_; ++k) out[k] = sum * own[k] - out[k];
      }
    });
  }

  const Operands<T>& o_;
  Cell& cell_;
  const StripPlan<T> plan_;
  const int64_t n_, d_;
  const bool products_;
  int64_t panel_stride_ = 0, row_stride_ = 0, depth_ = 0, depth_panels_ = 0, chunks_each_ = 0, groups_ = 0,
          blocks_before_ = 0;
  int workers_ = 1;
  Buffer<T> squares_;  // of the strip's rows, for distances; of halves their rests
  Buffer<T> rows_, panels_, blocks_, x_rows_, partial_, scaled_, rounded_, row_sums_;
  Buffer<double> column_sums_;
  Buffer<int32_t> near_;
  Buffer<Places> places_;
};

}  // namespace
}  // namespace nearfar
