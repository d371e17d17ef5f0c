// Kernel matrix times matrix, K(x, y) v, and its gradient, without the kernel matrix.
//
//   out_i  = sum_j k(x_i, y_j) v_j
//   dx_i   = sum_j <g_i, v_j> pull_ij (x_i - y_j)     (of <g, K v>; v's own gradient is K(y, x) g: the same operation)
#include "cpu/mask.hpp"

namespace nearfar {
namespace {

template <class T, class Map>
class Matmul {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr int kWide = P::MR / 3;  // columns of v taken together

 public:
  explicit Matmul(const MatmulParams<T>& params)
      : p(params), n(p.x.n), m(p.y.n), r(p.v.d), o(p.x, p.y, false, Map::kDistance, false, p.threads) {}

  void run() {
    pack_v();
    const int64_t strips = ceil_div(n, P::kStripRows), chunks = o.chunks.count;
    // Few rows: cut the columns too, by the shape alone, and add the parts in order.
    splits_ = o.chunks.parts(strips);
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
    const int64_t rows = o.chunks.tiles * P::MR;
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
    const int64_t d = o.d, row = s * P::kStripRows, rows_total = o.chunks.tiles * P::MR;
    const int64_t panels = ceil_div(n - row < P::kStripRows ? n - row : P::kStripRows, NR);
    Buffer<T> rows(o.row_buffer()), packed(P::kStripRows * d), block(o.chunks.tiles_each * P::MR * NR);
    alignas(64) T squares[P::kStripRows];
    for (int64_t p_ = 0; p_ < panels; ++p_)
      o.pack_panel(row + p_ * NR, T(1), rows.get(), packed.get() + p_ * NR * d, squares + p_ * NR);
    for (int64_t k = 0; k < r * P::kStripRows; ++k) out[k] = 0;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t t0 = o.chunks.tile_begin(chunk), t1 = o.chunks.tile_end(chunk);
      const int64_t column = t0 * P::MR, columns = (t1 - t0) * P::MR;
      for (int64_t q = 0; q < panels; ++q) {
        o.block(t0, t1, row + q * NR, packed.get() + q * NR * d, squares + q * NR, block.get());
        if (width_ == 1) {
          one_column(block.get(), columns, v_.get() + column, out + q * NR);
          continue;
        }
        for (int64_t k = 0; k < columns * NR; k += kLanes<T>) store(block.get() + k, Map::value(load(block.get() + k)));
        for (int64_t g = 0; g < groups_; ++g)
          wide(block.get(), columns, v_.get() + (g * rows_total + column) * kWide, r - g * kWide,
               out + g * kWide * P::kStripRows + q * NR);
      }
    }
  }

  /// Map and multiply in one go: the latency of the sum hides behind the map.
  static void one_column(const T* scores, int64_t columns, const T* v, T* out) {
    Vec<T> sum[P::kVectors];
#pragma GCC unroll 2
    for (int k = 0; k < P::kVectors; ++k) sum[k] = Vec<T>{};
    for (int64_t j = 0; j < columns; ++j) {
      const Vec<T> factor = splat<T>(v[j]);
#pragma GCC unroll 2
      for (int k = 0; k < P::kVectors; ++k) sum[k] += Map::value(load(scores + j * NR + k * kLanes<T>)) * factor;
    }
#pragma GCC unroll 2
    for (int k = 0; k < P::kVectors; ++k) store(out + k * kLanes<T>, load(out + k * kLanes<T>) + sum[k]);
  }

  static void wide(const T* weights, int64_t columns, const T* v, int64_t valid, T* out) {
    Vec<T> acc[kWide][P::kVectors];
    clear<T>(acc);
    multiply<Dot, T, kWide, P::kVectors, 1, kWide>(columns, v, weights, acc);
    for (int c = 0; c < kWide && c < valid; ++c)
      for (int k = 0; k < P::kVectors; ++k) {
        T* place = out + c * P::kStripRows + k * kLanes<T>;
        store(place, load(place) + acc[c][k]);
      }
  }

  const MatmulParams<T>& p;
  const int64_t n, m, r;
  Operands<T> o;
  int64_t splits_ = 1, width_ = 1, groups_ = 1;
  Buffer<T> v_, parts_;
};

/// W_ij = <g_i, v_j> pull(k(x_i, y_j)): two blocks of scores, one of points and one of coefficients.
template <class T, class Map>
struct MatmulGradCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;

  void map(const Block<T>& b) {
    const int64_t r = coefficients.d;
    Buffer<T> rows(coefficients.row_buffer()), panel(P::NR * r), product(b.columns * P::NR);
    for (int64_t p = 0; p < b.panels; ++p) {
      coefficients.pack_panel(b.row + p * P::NR, T(1), rows.get(), panel.get(), nullptr);
      coefficients.block(b.column / P::MR, (b.column + b.columns) / P::MR, 0, panel.get(), nullptr, product.get());
      T* s = b.panel(p);
      for (int64_t k = 0; k < b.columns * P::NR; k += kLanes<T>)
        store(s + k, load(product.get() + k) * Map::pull(Map::value(load(s + k))));
    }
  }
  void close(int64_t, int64_t, int64_t) {}
  const T* factor(int64_t) const { return nullptr; }

  const Operands<T>& coefficients;
};

template <class T>
void gradient(const MatmulGradParams<T>& p) {
  with_map(p.map, [&](auto map) {
    using Map = decltype(map);
    Operands<T> o(p.x, p.y, false, Map::kDistance, true, p.threads);
    const Operands<T> coefficients(p.grad, p.v, false, false, false, p.threads);
    MatmulGradCell<T, Map> cell{coefficients};
    StripPlan<T> plan;
    plan.threads = p.threads;
    plan.dx = p.dx;
    plan.dy = p.dy;
    StripPass<T, MatmulGradCell<T, Map>>(o, cell, plan).run();
  });
}

template <class T>
void product(const MatmulParams<T>& p) {
  with_map(p.map, [&](auto map) { Matmul<T, decltype(map)>(p).run(); });
}

}  // namespace

namespace NEARFAR_ISA {
void matmul(const MatmulParams<float>& p) { product(p); }
void matmul(const MatmulParams<double>& p) { product(p); }
void matmul_grad(const MatmulGradParams<float>& p) { gradient(p); }
void matmul_grad(const MatmulGradParams<double>& p) { gradient(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
