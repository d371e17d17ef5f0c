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
  static constexpr int64_t kSymmetricRows = 32 * P::kStripRows;

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
    pack_v();
    if (p.same && r == 1 && n >= kSymmetricRows) return run_symmetric();
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

  /// A strip of rows, packed, and the kernel's values of a panel of it against the columns of a chunk.
  class Strip {
   public:
    Strip(const Matmul& own, int64_t row)
        : row(row),
          count(own.n - row < P::kStripRows ? own.n - row : P::kStripRows),
          panels(ceil_div(count, NR)),
          own_(own),
          packed_(panels * own.scores_.packed()),
          squares_(panels * own.scores_.squares()) {
      const Scores<T>& scores = own.scores_;
      const int64_t size = own.chunks_.tiles_each * P::MR * NR;
      blocks_ = Buffer<T>(scores.count * size);
      for (int k = 0; k < scores.count; ++k) tiles_[k] = blocks_.get() + k * size;
      Buffer<T> rows(scores.row_buffer());
      for (int64_t q = 0; q < panels; ++q)
        scores.pack(row + q * NR, rows.get(), packed_.get() + q * scores.packed(),
                    squares_.get() + q * scores.squares());
    }
    T* values(int64_t chunk, int64_t q) {
      const Scores<T>& scores = own_.scores_;
      const int64_t t0 = own_.chunks_.tile_begin(chunk), t1 = own_.chunks_.tile_end(chunk);
      scores.block(t0, t1, row + q * NR, packed_.get() + q * scores.packed(), squares_.get() + q * scores.squares(),
                   tiles_);
      own_.evaluator_.forward(tiles_, (t1 - t0) * P::MR * NR, tiles_[0]);
      return tiles_[0];
    }
    const int64_t row, count, panels;

   private:
    const Matmul& own_;
    Buffer<T> packed_, squares_, blocks_;
    T* tiles_[Program::kScores];
  };

  /// One strip of rows against chunks [first, last): out[column of v][row of the strip].
  void strip(int64_t s, int64_t first, int64_t last, T* out) {
    Strip strip(*this, s * P::kStripRows);
    for (int64_t k = 0; k < r * P::kStripRows; ++k) out[k] = 0;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t t0 = chunks_.tile_begin(chunk), t1 = chunks_.tile_end(chunk);
      const int64_t column = t0 * P::MR, columns = (t1 - t0) * P::MR;
      for (int64_t q = 0; q < strip.panels; ++q) {
        const T* block = strip.values(chunk, q);
        if (width_ == 1) {
          one_column(block, columns, v_.get() + column, out + q * NR);
          continue;
        }
        for (int64_t g = 0; g < groups_; ++g) {
          const T* v = v_.get() + (g * rows_ + column) * kWide;
          T* to = out + g * kWide * P::kStripRows + q * NR;
          const int64_t valid = r - g * kWide;
          if (valid > 2 * kWide / 3)
            wide<kWide>(block, columns, v, valid, to);
          else if (valid > kWide / 3)
            wide<2 * kWide / 3>(block, columns, v, valid, to);
          else
            wide<kWide / 3>(block, columns, v, valid, to);
        }
      }
    }
  }

  /// y is x and v one column: a pair i > j serves row i and row j. Strips go to groups by the shape alone; a group adds
  /// to a vector of its own, and the vectors are added in order.
  void run_symmetric() {
    constexpr int64_t kGroups = 64;
    const int64_t strips = ceil_div(n, P::kStripRows), groups = strips < kGroups ? strips : kGroups;
    parts_ = Buffer<T>(groups * rows_);
    for (int64_t last = strips - 1; last >= 0; last -= groups)  // the longest first
      parallel_for(groups < last + 1 ? groups : last + 1, p.threads, [&](int64_t group, int) {
        T* out = parts_.get() + group * rows_;
        for (int64_t i = 0; last == strips - 1 && i < rows_; ++i) out[i] = 0;
        triangle((last - group) * P::kStripRows, out);
      });
    parallel_for(strips, p.threads, [&](int64_t s, int) {
      for (int64_t i = s * P::kStripRows; i < (s + 1) * P::kStripRows && i < n; ++i) {
        T sum = 0;
        for (int64_t group = 0; group < groups; ++group) sum += parts_[group * rows_ + i];
        p.out[i] = sum;
      }
    });
  }

  /// The pairs of a strip of rows with the columns before them.
  void triangle(int64_t row, T* out) {
    constexpr int L = kLanes<T>;
    Strip strip(*this, row);
    Buffer<T> down(chunks_.tiles_each * P::MR * L);
    alignas(64) T across[P::kStripRows] = {};
    for (int64_t chunk = 0; chunk < chunks_.count && chunks_.tile_begin(chunk) * P::MR < row + strip.count; ++chunk) {
      const int64_t column = chunks_.tile_begin(chunk) * P::MR, columns = chunks_.tile_end(chunk) * P::MR - column;
      for (int64_t k = 0; k < columns * L; ++k) down[k] = 0;
      for (int64_t q = 0; q < strip.panels; ++q) {
        const int64_t first = row + q * NR;
        T* block = strip.values(chunk, q);
        // Pairs past the diagonal, and rows past the last one.
        const bool edge = column + columns > first || first + NR > n;
        for (int64_t j = 0; edge && j < columns; ++j)
          for (int64_t i = 0; i < NR; ++i)
            if (column + j > first + i || first + i >= n) block[j * NR + i] = 0;
        one_column(block, columns, v_.get() + column, across + q * NR);
        for (int64_t i = 0; edge && i < NR; ++i)  // the diagonal has served
          if (const int64_t j = first + i - column; j >= 0 && j < columns) block[j * NR + i] = 0;
        Vec<T> v[P::kVectors];
#pragma GCC unroll 2
        for (int k = 0; k < P::kVectors; ++k) v[k] = load(v_.get() + first + k * L);
        for (int64_t j = 0; j < columns; ++j) {
          Vec<T> sum = load(down.get() + j * L);
#pragma GCC unroll 2
          for (int k = 0; k < P::kVectors; ++k) sum += load(block + j * NR + k * L) * v[k];
          store(down.get() + j * L, sum);
        }
      }
      for (int64_t j = 0; j < columns; ++j) out[column + j] += hsum<T>(load(down.get() + j * L));
    }
    for (int64_t i = 0; i < strip.count; ++i) out[row + i] += across[i];
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

/// The upstream gradient of k(x_i, y_j) is <g_i, v_j>: scores too. Few rows change places with the columns.
template <class T>
void gradient(const MatmulGradParams<T>& given) {
  using P = Policy<T>;
  MatmulGradParams<T> p = given;
  if (few<T>(p.x.n, p.y.n)) {
    std::swap(p.x, p.y);
    std::swap(p.grad, p.v);
    std::swap(p.dx, p.dy);
  }
  const Operands<T> coefficients(p.grad, p.v, false, false, false, p.threads);
  auto upstream = [&](const Block<T>& b, int64_t panel, T* out) {
    Buffer<T> rows(coefficients.row_buffer()), packed(P::NR * p.v.d);
    coefficients.pack_panel(b.row + panel * P::NR, T(1), rows.get(), packed.get(), nullptr);
    coefficients.raw_block(b.column / P::MR, (b.column + b.columns) / P::MR, packed.get(), out);
  };
  program_gradient(*p.program, p.x, p.y, upstream, p.dx, p.dy, p.dparameters, p.threads);
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
