// Kernel matrix times matrix, K(x, y) v, and its gradient, without the kernel matrix.
//
//   out_i  = sum_j k(x_i, y_j) v_j
//   dx_i   = sum_j <g_i, v_j> pull_ij (x_i - y_j)     (of <g, K v>; v's own gradient is K(y, x) g: the same operation)
#include "cpu/program.hpp"

namespace nearfar {
namespace {

template <class T>
class Matmul {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr int kWide = P::MR;  // columns of v taken together

 public:
  explicit Matmul(const MatmulParams<T>& params)
      : p(params),
        n(p.x.n),
        m(p.y.n),
        r(p.v.d),
        scores_(*p.program, p.x, p.y, p.same, false, p.threads),
        evaluator_(*p.program),
        chunks_(scores_.chunks()) {}

  void run() {
    pack_v();
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
    const int64_t rows = chunks_.tiles * P::MR;
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

  /// One strip of rows against chunks [first, last): out[column of v][row of the strip].
  void strip(int64_t s, int64_t first, int64_t last, T* out) {
    const int64_t row = s * P::kStripRows, rows_total = chunks_.tiles * P::MR;
    const int64_t panels = ceil_div(n - row < P::kStripRows ? n - row : P::kStripRows, NR);
    const int64_t size = chunks_.tiles_each * P::MR * NR;
    Buffer<T> rows(scores_.row_buffer()), packed(panels * scores_.packed()), squares(panels * scores_.squares());
    Buffer<T> blocks(scores_.count * size);
    T* tiles[Program::kScores];
    for (int k = 0; k < scores_.count; ++k) tiles[k] = blocks.get() + k * size;
    T* block = tiles[0];
    for (int64_t q = 0; q < panels; ++q)
      scores_.pack(row + q * NR, rows.get(), packed.get() + q * scores_.packed(),
                   squares.get() + q * scores_.squares());
    for (int64_t k = 0; k < r * P::kStripRows; ++k) out[k] = 0;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t t0 = chunks_.tile_begin(chunk), t1 = chunks_.tile_end(chunk);
      const int64_t column = t0 * P::MR, columns = (t1 - t0) * P::MR;
      for (int64_t q = 0; q < panels; ++q) {
        scores_.block(t0, t1, row + q * NR, packed.get() + q * scores_.packed(), squares.get() + q * scores_.squares(),
                      tiles);
        evaluator_.forward(tiles, columns * NR, block);
        if (width_ == 1) {
          one_column(block, columns, v_.get() + column, out + q * NR);
          continue;
        }
        for (int64_t g = 0; g < groups_; ++g) {
          const T* v = v_.get() + (g * rows_total + column) * kWide;
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
  int64_t splits_ = 1, width_ = 1, groups_ = 1;
  Buffer<T> v_, parts_;
};

/// The upstream gradient of k(x_i, y_j) is <g_i, v_j>: scores too.
template <class T>
void gradient(const MatmulGradParams<T>& p) {
  using P = Policy<T>;
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
  Matmul<T>(p).run();
}

}  // namespace

namespace NEARFAR_ISA {
void matmul(const MatmulParams<float>& p) { product(p); }
void matmul(const MatmulParams<double>& p) { product(p); }
void matmul_grad(const MatmulGradParams<float>& p) { gradient(p); }
void matmul_grad(const MatmulGradParams<double>& p) { gradient(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
