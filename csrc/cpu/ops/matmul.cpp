// Kernel matrix times matrix, K(x, y) v, and its gradient, without the kernel matrix.
//
//   out_i  = sum_j k(x_i, y_j) v_j
//   dx_i   = sum_j <g_i, v_j> pull_ij (x_i - y_j)     (of <g, K v>; v's own gradient is K(y, x) g: the same operation)
#include <utility>

#include "cpu/few.hpp"
#include "cpu/together.hpp"

namespace nearfar {
namespace {

template <class T>
class Matmul {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr int kWide = P::MR;  // columns of v taken together
  static constexpr int64_t kSymmetricRows = 8 * P::kStripRows;
  static constexpr int kLanesApart = 4;

 public:
  explicit Matmul(const MatmulParams<T>& params)
      : p(params),
        n(p.x.n),
        m(p.y.n),
        r(p.v.d),
        scores_(*p.program, p.x, p.y, p.same, false, p.threads),
        evaluator_(*p.program),
        chunks_(scores_.chunks()),
        rows_(chunks_.tiles * P::MR + NR) {}

  void run() {
    if (r == 0) return;
    pack_v();
    if (p.same && n >= kSymmetricRows && r <= 16 + p.x.d) return run_symmetric();
    const int64_t strips = ceil_div(n, P::kStripRows), chunks = chunks_.count;
    // Few rows: cut the columns too, by the shape alone, and add the parts in order.
    splits_ = chunks_.parts(strips);
    const int64_t part = strips * P::kStripRows * r;
    parts_ = Buffer<T>(splits_ * part);
    parallel_for(strips * splits_, p.threads, [&](int64_t task, int) {
      strip(task / splits_, chunks * (task % splits_) / splits_, chunks * (task % splits_ + 1) / splits_,
            parts_.get() + (task % splits_) * part + (task / splits_) * P::kStripRows * r);
    });
    parallel_for(strips, p.threads, [&](int64_t s, int) {
      for (int64_t i = s * P::kStripRows; i < (s + 1) * P::kStripRows && i < n; ++i)
        for (int64_t c = 0; c < r; ++c) {
          T sum = 0;
          for (int64_t q = 0; q < splits_; ++q)
            sum += parts_[q * part + s * P::kStripRows * r + c * P::kStripRows + i - s * P::kStripRows];
          p.out[i * r + c] = sum;
        }
    });
  }

 private:
  /// v in groups of kWide columns: [group][row][kWide], zero past the end in both directions.
  void pack_v() {
    const int64_t rows = rows_;
    width_ = r == 1 ? 1 : kWide;
    groups_ = ceil_div(r, width_);
    v_ = Buffer<T>(groups_ * rows * width_);
    Source<T> v(p.v);
    parallel_for(ceil_div(rows, 256), p.threads, [&](int64_t task, int) {
      Buffer<T> row(groups_ * width_);
      for (int64_t j = task * 256; j < rows && j < (task + 1) * 256; ++j) {
        for (int64_t c = 0; c < groups_ * width_; ++c) row[c] = 0;
        if (j < m) v.read(j, row.get());
        for (int64_t g = 0; g < groups_; ++g)
          for (int64_t c = 0; c < width_; ++c) v_[(g * rows + j) * width_ + c] = row[g * width_ + c];
      }
    });
  }

  /// Room for the scores of a panel of rows against the columns of a chunk.
  struct Tiles {
    explicit Tiles(const Matmul& own) {
      const int64_t size = own.chunks_.tiles_each * P::MR * NR;
      blocks = Buffer<T>(own.scores_.count * size);
      for (int k = 0; k < own.scores_.count; ++k) scores[k] = blocks.get() + k * size;
    }
    Buffer<T> blocks;
    T* scores[Program::kScores];
  };

  /// Up to `most` rows, packed, and the kernel's values of a panel of them against tiles [t0, t1) of columns.
  class Panels {
   public:
    Panels(const Matmul& own, int64_t row, int64_t most, int threads)
        : row(row),
          count(own.n - row < most ? own.n - row : most),
          panels(ceil_div(count, NR)),
          own_(own),
          packed_(panels * own.scores_.packed()),
          squares_(panels * own.scores_.squares()) {
      const Scores<T>& scores = own.scores_;
      parallel_for(panels, threads, [&](int64_t q, int) {
        Buffer<T> rows(scores.row_buffer());
        scores.pack(row + q * NR, rows.get(), packed_.get() + q * scores.packed(),
                    squares_.get() + q * scores.squares());
      });
    }
    T* values(int64_t t0, int64_t t1, int64_t q, const Tiles& tiles) const {
      const Scores<T>& scores = own_.scores_;
      scores.block(t0, t1, row + q * NR, packed_.get() + q * scores.packed(), squares_.get() + q * scores.squares(),
                   tiles.scores);
      own_.evaluator_.forward(tiles.scores, (t1 - t0) * P::MR * NR, tiles.scores[0]);
      return tiles.scores[0];
    }
    const int64_t row, count, panels;

   private:
    const Matmul& own_;
    Buffer<T> packed_, squares_;
  };

  /// One strip of rows against chunks [first, last): out[column of v][row of the strip].
  void strip(int64_t s, int64_t first, int64_t last, T* out) const {
    const Panels rows(*this, s * P::kStripRows, P::kStripRows, 1);
    const Tiles tiles(*this);
    for (int64_t k = 0; k < r * P::kStripRows; ++k) out[k] = 0;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t t0 = chunks_.tile_begin(chunk), t1 = chunks_.tile_end(chunk);
      for (int64_t q = 0; q < rows.panels; ++q)
        add_across(rows.values(t0, t1, q, tiles), t0 * P::MR, (t1 - t0) * P::MR, out + q * NR);
    }
  }

  /// out[column of v][lane] += values times the rows of v that the columns are.
  void add_across(const T* values, int64_t column, int64_t columns, T* out) const {
    if (width_ == 1) return one_column(values, columns, v_.get() + column, out);
    for (int64_t g = 0; g < groups_; ++g) {
      const T* v = v_.get() + (g * rows_ + column) * kWide;
      T* to = out + g * kWide * P::kStripRows;
      const int64_t valid = r - g * kWide;
      if (valid > 2 * kWide / 3)
        wide<kWide>(values, columns, v, valid, to);
      else if (valid > kWide / 3)
        wide<2 * kWide / 3>(values, columns, v, valid, to);
      else
        wide<kWide / 3>(values, columns, v, valid, to);
    }
  }

  /// y is x: a pair i > j serves row i and row j. A task is a strip of rows and a group of chunks of columns, and has
  /// sums of its own for both; these are added in order, after as many strips as there is room for.
  void run_symmetric() {
    constexpr int64_t kGroups = 64, kStrips = 16, kRoom = 1 << 18;
    const int64_t size = n * r, partial = r * P::kStripRows, chunks_each = ceil_div(chunks_.count, kGroups);
    const int64_t room = kRoom / size < 1 ? 1 : kRoom / size < kStrips ? kRoom / size : kStrips;
    const Buffer<T> down(room * size), across(room * ceil_div(chunks_.count, chunks_each) * partial);
    for (int64_t row = 0; row < n; row += room * P::kStripRows) {
      const Panels rows(*this, row, room * P::kStripRows, p.threads);
      Buffer<T> v_rows(rows.panels * panel_of_v());
      turn_v(rows, v_rows.get());
      const int64_t end = row + rows.count, strips = ceil_div(rows.count, P::kStripRows);
      const int64_t chunks = ceil_div(ceil_div(end, P::MR), chunks_.tiles_each), groups = ceil_div(chunks, chunks_each);
      parallel_for(strips * groups, p.threads, [&](int64_t task, int) {
        const int64_t s = task / groups, first = task % groups * chunks_each;
        const int64_t last = first + chunks_each < chunks ? first + chunks_each : chunks;
        T *own = across.get() + task * partial, *others = down.get() + s * size;
        for (int64_t k = 0; k < partial; ++k) own[k] = 0;
        const int64_t rows_end = chunks_.tile_end(last - 1) * P::MR;
        for (int64_t k = chunks_.tile_begin(first) * P::MR * r; k < size && k < rows_end * r; ++k) others[k] = 0;
        for (int64_t chunk = first; chunk < last; ++chunk) triangle(rows, s, chunk, v_rows.get(), own, others);
      });
      parallel_for(ceil_div(end, P::kStripRows), p.threads, [&](int64_t task, int) {
        const int64_t begin = task * P::kStripRows,
                      rows_end = begin + P::kStripRows < end ? begin + P::kStripRows : end;
        for (int64_t k = begin < row ? rows_end * r : begin * r; k < rows_end * r; ++k) p.out[k] = 0;
        for (int64_t s = 0; s < strips; ++s)
          for (int64_t k = begin * r; k < rows_end * r; ++k) p.out[k] += down[s * size + k];
        if (begin < row) return;
        T* own = across.get() + (begin - row) / P::kStripRows * groups * partial;
        for (int64_t g = 1; g < groups; ++g)
          for (int64_t k = 0; k < partial; ++k) own[k] += own[g * partial + k];
        for (int64_t i = begin; i < rows_end; ++i)
          for (int64_t c = 0; c < r; ++c) p.out[i * r + c] += own[c * P::kStripRows + i - begin];
      });
    }
  }

  /// v of the rows of a panel, as `triangle` multiplies it: rows along the lanes if r is small, or else columns of v.
  bool apart() const { return r <= kLanesApart; }
  int64_t panel_of_v() const { return (apart() ? r : ceil_div(r, NR) * NR) * NR; }
  void turn_v(const Panels& rows, T* out) const {
    const int64_t size = panel_of_v();
    parallel_for(rows.panels, p.threads, [&](int64_t q, int) {
      for (int64_t k = 0; k < size; ++k) {
        const int64_t i = apart() ? k % NR : k / NR % NR, c = apart() ? k / NR : k / (NR * NR) * NR + k % NR;
        out[q * size + k] = c < r ? v_[(c / width_ * rows_ + rows.row + q * NR + i) * width_ + c % width_] : T(0);
      }
    });
  }

  /// The pairs of a strip of the rows with the columns of a chunk before them: v of these to `across`, v of the strip
  /// to `down`.
  void triangle(const Panels& rows, int64_t strip, int64_t chunk, const T* v_rows, T* across, T* down) const {
    constexpr int64_t kPanels = P::kStripRows / NR;
    const int64_t t0 = chunks_.tile_begin(chunk), column = t0 * P::MR, most = chunks_.tiles_each * P::MR;
    const Tiles tiles(*this);
    const int64_t lanes = apart() ? most * kLanes<T> : 0;  // of sums for a column of v
    Buffer<T> sums(r * lanes);
    for (int64_t k = 0; k < r * lanes; ++k) sums[k] = 0;
    for (int64_t q = strip * kPanels; q < (strip + 1) * kPanels && q < rows.panels; ++q) {
      const int64_t first = rows.row + q * NR, below = ceil_div(first + NR, P::MR);
      const int64_t t1 = below < chunks_.tile_end(chunk) ? below : chunks_.tile_end(chunk), columns = (t1 - t0) * P::MR;
      if (t1 <= t0) continue;
      T* block = rows.values(t0, t1, q, tiles);
      // Pairs past the diagonal, and rows past the last one.
      const bool edge = column + columns > first || first + NR > n;
      for (int64_t j = 0; edge && j < columns; ++j)
        for (int64_t i = 0; i < NR; ++i)
          if (column + j > first + i || first + i >= n) block[j * NR + i] = 0;
      add_across(block, column, columns, across + q % kPanels * NR);
      for (int64_t i = 0; edge && i < NR; ++i)  // the diagonal has served
        if (const int64_t j = first + i - column; j >= 0 && j < columns) block[j * NR + i] = 0;
      if (apart())
        add_lanes(block, columns, v_rows + q * panel_of_v(), lanes, sums.get());
      else
        add_down(block, column, t1 - t0, v_rows + q * panel_of_v(), down);
    }
    for (int64_t j = 0; apart() && j < most && column + j < n; ++j)
      for (int64_t c = 0; c < r; ++c)
        down[(column + j) * r + c] += hsum<T>(load(sums.get() + c * lanes + j * kLanes<T>));
  }

  /// Adds values of a panel times v of its rows to the sums of the rows that the columns are.
  void add_down(const T* values, int64_t column, int64_t tiles, const T* v_rows, T* down) const {
    for (int64_t t = 0; t < tiles; ++t, values += P::MR * NR, column += P::MR)
      for (int64_t c = 0; c < r; c += NR) {
        const T* v = v_rows + c * NR;
        T* out = down + column * r + c;
        if (r - c > kLanes<T>)
          product_dy<Dot, T, 2>(1, values, 0, v, n - column, r - c, out, r);
        else
          product_dy<Dot, T, 1>(1, values, 0, v, n - column, r - c, out, r);
      }
  }

  /// The same for few columns of v, of which a vector would hold little: lanes of rows are added in the end.
  void add_lanes(const T* values, int64_t columns, const T* v_rows, int64_t lanes, T* down) const {
    if (r == 1) return add_lanes_of<1>(values, columns, v_rows, lanes, down);
    if (r == 2) return add_lanes_of<2>(values, columns, v_rows, lanes, down);
    if (r == 3) return add_lanes_of<3>(values, columns, v_rows, lanes, down);
    add_lanes_of<kLanesApart>(values, columns, v_rows, lanes, down);
  }
  template <int C>
  static void add_lanes_of(const T* values, int64_t columns, const T* v_rows, int64_t lanes, T* down) {
    Vec<T> v[C][P::kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
#pragma GCC unroll 2
      for (int k = 0; k < P::kVectors; ++k) v[c][k] = load(v_rows + c * NR + k * kLanes<T>);
    for (int64_t j = 0; j < columns; ++j)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        Vec<T> sum = load(down + c * lanes + j * kLanes<T>);
#pragma GCC unroll 2
        for (int k = 0; k < P::kVectors; ++k) sum += load(values + j * NR + k * kLanes<T>) * v[c][k];
        store(down + c * lanes + j * kLanes<T>, sum);
      }
  }

  /// Two sums a vector, or each addition would wait for the one before. columns is a multiple of MR, which is even.
  static void one_column(const T* weights, int64_t columns, const T* v, T* out) {
    Vec<T> sum[2][P::kVectors];
    clear<T>(sum);
    for (int64_t j = 0; j < columns; j += 2)
#pragma GCC unroll 2
      for (int u = 0; u < 2; ++u)
#pragma GCC unroll 2
        for (int k = 0; k < P::kVectors; ++k)
          sum[u][k] += load(weights + (j + u) * NR + k * kLanes<T>) * splat<T>(v[j + u]);
#pragma GCC unroll 2
    for (int k = 0; k < P::kVectors; ++k)
      store(out + k * kLanes<T>, load(out + k * kLanes<T>) + (sum[0][k] + sum[1][k]));
  }

  template <int M>
  static void wide(const T* weights, int64_t columns, const T* v, int64_t valid, T* out) {
    Vec<T> acc[M][P::kVectors];
    clear<T>(acc);
    multiply<Dot, T, M, P::kVectors, 1, kWide>(columns, v, weights, acc);
#pragma GCC unroll 12
    for (int c = 0; c < M; ++c)
#pragma GCC unroll 2
      for (int k = 0; k < P::kVectors; ++k) {
        T* place = out + c * P::kStripRows + k * kLanes<T>;
        if (c < valid) store(place, load(place) + acc[c][k]);
      }
  }

  const MatmulParams<T>& p;
  const int64_t n, m, r;
  const Scores<T> scores_;
  const Evaluator<T> evaluator_;
  const Chunks& chunks_;
  const int64_t rows_;  // of v, packed: zeros behind the last tile and the last panel
  int64_t splits_ = 1, width_ = 1, groups_ = 1;
  Buffer<T> v_, parts_;
};

/// The product for them: columns run along the lanes. A task is a run of columns, whose sums are added in order.
template <class T>
void few_rows(const MatmulParams<T>& p) {
  using P = Policy<T>;
  constexpr int64_t NR = P::NR, kEach = 1024 / NR;
  const Scores<T> scores(*p.program, p.y, p.x, false, false, p.threads);
  const Evaluator<T> evaluator(*p.program);
  const Source<T> v(p.v);
  const int64_t m = p.y.n, r = p.v.d, results = p.x.n * r, tiles = scores.chunks().tiles, size = tiles * P::MR * NR;
  const int64_t panels = ceil_div(m, NR), tasks = ceil_div(panels, kEach);
  Buffer<T> parts(tasks * results);
  parallel_for(tasks, p.threads, [&](int64_t task, int) {
    Buffer<T> rows(scores.row_buffer()), packed(scores.packed()), squares(scores.squares());
    Buffer<T> blocks(scores.count * size), row(r), weights(r * NR), sums(results * NR);
    T* values[Program::kScores];
    for (int s = 0; s < scores.count; ++s) values[s] = blocks.get() + s * size;
    for (int64_t k = 0; k < results * NR; ++k) sums[k] = 0;
    for (int64_t panel = task * kEach; panel < (task + 1) * kEach && panel < panels; ++panel) {
      const int64_t j0 = panel * NR, lanes = m - j0 < NR ? m - j0 : NR;
      scores.pack(j0, rows.get(), packed.get(), squares.get());
      scores.block(0, tiles, j0, packed.get(), squares.get(), values);
      evaluator.forward(values, size, values[0]);
      for (int64_t lane = 0; lane < NR; ++lane) {
        if (lane < lanes) v.read(j0 + lane, row.get());
        for (int64_t c = 0; c < r; ++c) weights[c * NR + lane] = lane < lanes ? row[c] : T(0);
        for (int64_t i = 0; lane >= lanes && i < p.x.n; ++i) values[0][i * NR + lane] = 0;
      }
      for (int64_t k = 0; k < results; ++k)
        for (int64_t at = 0; at < NR; at += kLanes<T>)
          store(sums.get() + k * NR + at, load(sums.get() + k * NR + at) + load(values[0] + k / r * NR + at) *
                                                                               load(weights.get() + k % r * NR + at));
    }
    for (int64_t k = 0; k < results; ++k) {
      Vec<T> sum = Vec<T>{};
      for (int64_t at = 0; at < NR; at += kLanes<T>) sum += load(sums.get() + k * NR + at);
      parts[task * results + k] = hsum<T>(sum);
    }
  });
  for (int64_t k = 0; k < results; ++k) {
    T sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += parts[task * results + k];
    p.out[k] = sum;
  }
}

/// Rows of two sets side by side.
template <class T>
Rows beside(const Rows& first, const Rows& second, Buffer<T>& memory) {
  Rows both = first;
  both.d = both.row_stride = first.d + second.d;
  both.col_stride = 1;
  both.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  memory = Buffer<T>(both.n * both.d);
  both.data = memory.get();
  const Source<T> a(first), b(second);
  for (int64_t i = 0; i < both.n; ++i)
    a.read(i, memory.get() + i * both.d), b.read(i, memory.get() + i * both.d + a.d());
  return both;
}

/// The upstream gradient of k(x_i, y_j) is <g_i, v_j>: scores too. Where y is x, that of a pair is <g_i, v_j> +
/// <g_j, v_i>, one score of both side by side. Few rows change places with the columns.
template <class T>
void gradient(const MatmulGradParams<T>& given) {
  using P = Policy<T>;
  MatmulGradParams<T> p = given;
  Buffer<T> grad_v, v_grad;
  if (p.same) {
    p.v = beside(given.v, given.grad, v_grad);
    p.grad = beside(given.grad, given.v, grad_v);
  } else if (few<T>(p.x.n, p.y.n)) {
    std::swap(p.x, p.y);
    std::swap(p.grad, p.v);
    std::swap(p.dx, p.dy);
  }
  const Operands<T> coefficients(p.grad, p.v, false, false, false, p.threads);
  auto upstream = [&](const Block<T>& b, int64_t panel, int64_t columns, T* out) {
    const int64_t first = b.row + panel * P::NR;
    Buffer<T> rows(coefficients.row_buffer()), packed(P::NR * p.v.d);
    coefficients.pack_panel(first, T(1), rows.get(), packed.get(), nullptr);
    coefficients.raw_block(b.column / P::MR, ceil_div(b.column + columns, P::MR), packed.get(), out);
    for (int64_t j = first - b.column < 0 ? 0 : first - b.column; p.same && j < columns; ++j)
      for (int64_t lane = 0; lane <= b.column + j - first && lane < P::NR; ++lane)
        out[j * P::NR + lane] = b.column + j == first + lane ? out[j * P::NR + lane] / 2 : T(0);
  };
  program_gradient(*p.program, p.x, p.y, p.same, upstream, p.dx, p.dy, p.dparameters, p.threads);
}

template <class T>
void product(const MatmulParams<T>& p) {
  // Of many columns of v the other form multiplies several at a time.
  if (few<T>(p.x.n, p.y.n) && !p.same && p.x.n * p.v.d <= 16) return few_rows(p);
  Matmul<T>(p).run();
}

template <class T>
void product_each(const MatmulParams<T>* problems, int64_t count) {
  const int64_t widest = problems->x.d < problems->v.d ? problems->v.d : problems->x.d;
  each_or_together<T>(problems, count, widest, product<T>, [](const MatmulParams<T>* p, int64_t several) {
    const ScoresTogether<T> scores(p, several, p->same);
    const Turned<T> v(several, [&](int u) { return p[u].v; });
    const int64_t size = p->x.n * v.d;
    Buffer<T> sums(size * kLanes<T>);
    sum_over(p->x.n, sums.get(), v, v.n, 1, times_other(scores.values()), sums.get());
    turn_back<false>(several, size, sums.get(), [&](int u) { return p[u].out; });
  });
}

template <class T>
void gradient_each(const MatmulGradParams<T>* problems, int64_t count) {
  const int64_t widest = problems->x.d < problems->v.d ? problems->v.d : problems->x.d;
  each_or_together<T>(problems, count, widest, gradient<T>, [](const MatmulGradParams<T>* p, int64_t several) {
    const ScoresTogether<T> scores(p, several, false);
    const Turned<T> v(several, [&](int u) { return p[u].v; });
    const Turned<T> grad(several, [&](int u) { return p[u].grad; });
    Buffer<T> upstream(scores.size);
    scores_of(grad, v, upstream.get(), Dot{});
    scores.gradient(upstream.get(), [&](int u) { return p[u].dx; }, [&](int u) { return p[u].dy; }, p->dparameters);
  });
}

}  // namespace

namespace NEARFAR_ISA {
void matmul(const MatmulParams<float>* p, int64_t count) { product_each(p, count); }
void matmul(const MatmulParams<double>* p, int64_t count) { product_each(p, count); }
void matmul_grad(const MatmulGradParams<float>* p, int64_t count) { gradient_each(p, count); }
void matmul_grad(const MatmulGradParams<double>* p, int64_t count) { gradient_each(p, count); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
