// Sums of products of two centred kernel matrices, which HSIC and CKA are made of, without the matrices.
//
//   K'_ij = k(x_i, x_j) - a_i - a_j,   L'_ij = l(y_i, y_j) - b_i - b_j,   rows sum to 0
//
// for all pairs, or (U-centring, Song et al. 2012) for those off the diagonal. One pass over a triangle: to centre
// before multiplying keeps the digits that tr(K L) - ... of nearly constant matrices cancels, and a guess of a and b
// from a few columns does nearly as well as a pass of its own. What rows r, s of these K~, L~ still sum to is known in
// the end:
//
//   sum K' L' = sum K~ L~ - 2 <r, s> / p + sum(r) sum(s) / q,   a_i = a~_i + r_i / p - sum(r) / 2 q
//   p, q = n, n^2; without the diagonal n - 2, (n - 1) (n - 2)
//
// To centre is an orthogonal projection, so the gradient of sum K' L' by k(x_i, x_j) is L'_ij: a and b are constants to
// it, and one more pass over the triangle makes both matrices again and multiplies the weights of both.
#include "cpu/program.hpp"

namespace nearfar {
namespace NEARFAR_ISA {
void matmul(const MatmulParams<float>*, int64_t);
void matmul(const MatmulParams<double>*, int64_t);
}  // namespace NEARFAR_ISA
namespace {

constexpr int kSides = 2;  // x with its kernel, y with its own

/// Both sides for a pass over the triangle column <= row.
template <class T>
class Sides {
 public:
  using P = Policy<T>;
  template <class Cell>
  using Passes = PerScore<StripPass<T, Cell>, kSides * Program::kScores>;

  /// offsets: a and b.
  template <class Params>
  Sides(const Params& p, const double* offsets, bool x_products, bool y_products)
      : n(p.points[0].n),
        diagonal(p.diagonal),
        scores{Scores<T>(*p.program[0], p.points[0], p.points[0], true, x_products, p.threads),
               Scores<T>(*p.program[1], p.points[1], p.points[1], true, y_products, p.threads)},
        evaluators{Evaluator<T>(*p.program[0]), Evaluator<T>(*p.program[1])} {
    plan.triangle = true;
    plan.threads = p.threads;
    plan.depth = depth_of<T>(scores[0].widest() > scores[1].widest() ? scores[0].widest() : scores[1].widest());
    for (int side = 0; side < kSides; ++side) fill(offsets_[side], [&](int64_t i) { return offsets[side * n + i]; });
  }

  /// A number of every row, and zeros to the end of the last tile and of the last panel.
  template <class F>
  void fill(Buffer<T>& out, F number) const {
    const int64_t size = chunks().tiles * P::MR + P::NR;
    out = Buffer<T>(size);
    for (int64_t i = 0; i < size; ++i) out[i] = i < n ? static_cast<T>(number(i)) : T(0);
  }

  const Chunks& chunks() const { return scores[0].chunks(); }
  const T* offsets(int side) const { return offsets_[side].get(); }
  int count() const { return scores[0].count + scores[1].count; }

  /// The scores of both sides in panel p.
  void tiles_of(const Block<T>* blocks, int64_t p, T* (&tiles)[kSides][Program::kScores]) const {
    for (int side = 0; side < kSides; ++side)
      for (int s = 0; s < scores[side].count; ++s) tiles[side][s] = (blocks++)->panel(p);
  }
  /// Whether so many columns of panel p meet the diagonal, or the panel has rows past the last one.
  bool at_edge(const Block<T>& b, int64_t p, int64_t columns) const {
    const int64_t row = b.row + p * P::NR;
    return b.column + columns > row || row + P::NR > n;
  }

  const int64_t n;
  const bool diagonal;
  const Scores<T> scores[kSides];
  const Evaluator<T> evaluators[kSides];
  StripPlan<T> plan;

 private:
  Buffer<T> offsets_[kSides];
};

/// Which lanes of a vector of rows from `row` on are a pair of the triangle with a column, and which is the diagonal.
template <class T>
struct Lanes {
  IVec<T> below, on;
  Lanes(int64_t row, int64_t column, int64_t n) {
    const auto relative = [row](int64_t i) {
      const int64_t lane = i - row, most = kLanes<T>;
      return isplat<T>(static_cast<IntOf<T>>(lane < -1 ? -1 : lane > most ? most : lane));
    };
    const IVec<T> exists = iota<T>() < relative(n);
    below = (iota<T>() > relative(column)) & exists;
    on = (iota<T>() == relative(column)) & exists;
  }
};

// ---- the sums ------------------------------------------------------------------------------------------------------

template <class T>
class SumCell {
  using P = Policy<T>;
  static constexpr int NR = P::NR, L = kLanes<T>, kSums = 3;

 public:
  static constexpr bool kScores = true;

  explicit SumCell(const Sides<T>& sides)
      : sides_(sides),
        chunk_sums_(sides.chunks().count * kSums),
        across_(sides.chunks().count * kSides * P::kStripRows),
        rows_(kSides * sides.n) {
    for (int64_t k = 0; k < sides.chunks().count * kSums; ++k) chunk_sums_[k] = 0;
    for (int64_t k = 0; k < kSides * sides.n; ++k) rows_[k] = 0;
  }

  void map(const Block<T>* blocks) {
    const Block<T>& b = blocks[0];
    Buffer<T> down(kSides * b.columns * L);
    for (int64_t k = 0; k < kSides * b.columns * L; ++k) down[k] = 0;
    for (int64_t p = 0; p < b.panels; ++p) {
      const int64_t columns = b.columns_below(p);
      T* tiles[kSides][Program::kScores];
      sides_.tiles_of(blocks, p, tiles);
      for (int side = 0; side < kSides; ++side)
        sides_.evaluators[side].forward(tiles[side], columns * NR, tiles[side][0]);
      if (sides_.at_edge(b, p, columns)) {
        if (sides_.diagonal) add_diagonal(b, p, columns, tiles[0][0], tiles[1][0]);
        add<true>(b, p, columns, tiles[0][0], tiles[1][0], down.get());
      } else {
        add<false>(b, p, columns, tiles[0][0], tiles[1][0], down.get());
      }
    }
    for (int side = 0; side < kSides; ++side)
      for (int64_t j = 0; j < b.columns && b.column + j < sides_.n; ++j)
        row(side, b.column + j) += static_cast<double>(hsum<T>(load(down.get() + (side * b.columns + j) * L)));
  }

  /// Chunks in order.
  void close(int64_t first, int64_t rows, int64_t chunks) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int side = 0; side < kSides; ++side)
        for (int64_t i = 0; i < rows; ++i) row(side, first + i) += static_cast<double>(across(chunk, side)[i]);
  }

  /// The sums, with those of the rows' remainders taken out, and the offsets with them in.
  void finish(const double* guess, double* values) const {
    const double n = static_cast<double>(sides_.n);
    const double p = sides_.diagonal ? n : n - 2, q = sides_.diagonal ? n * n : (n - 1) * (n - 2);
    double totals[kSides] = {}, products[kSums] = {}, sums[kSums] = {};
    const double *r = rows_.get(), *s = r + sides_.n;
    for (int64_t i = 0; i < sides_.n; ++i) {
      totals[0] += r[i], totals[1] += s[i];
      products[0] += r[i] * s[i], products[1] += r[i] * r[i], products[2] += s[i] * s[i];
    }
    for (int64_t chunk = 0; chunk < sides_.chunks().count; ++chunk)
      for (int k = 0; k < kSums; ++k) sums[k] += chunk_sums_[chunk * kSums + k];
    const double squares[kSums] = {totals[0] * totals[1], totals[0] * totals[0], totals[1] * totals[1]};
    for (int k = 0; k < kSums; ++k) values[k] = sums[k] - 2 / p * products[k] + squares[k] / q;
    for (int64_t i = 0; i < kSides * sides_.n; ++i)
      values[kSums + i] = guess[i] + rows_[i] / p - totals[i / sides_.n] / (2 * q);
  }

 private:
  double& row(int side, int64_t i) { return rows_[side * sides_.n + i]; }
  T* across(int64_t chunk, int side) { return across_.get() + (chunk * kSides + side) * P::kStripRows; }

  /// A pair on the diagonal counts once.
  void add_diagonal(const Block<T>& b, int64_t p, int64_t columns, const T* k, const T* l) {
    const int64_t first = b.row + p * NR;
    double* sums = chunk_sums_.get() + b.chunk * kSums;
    for (int64_t lane = 0; lane < NR && first + lane < sides_.n; ++lane) {
      const int64_t i = first + lane, j = i - b.column;
      if (j < 0 || j >= columns) continue;
      const double own = static_cast<double>(k[j * NR + lane] - sides_.offsets(0)[i] - sides_.offsets(0)[i]);
      const double other = static_cast<double>(l[j * NR + lane] - sides_.offsets(1)[i] - sides_.offsets(1)[i]);
      sums[0] += own * other, sums[1] += own * own, sums[2] += other * other;
      row(0, i) += own, row(1, i) += other;
    }
  }

  /// A pair below it twice: in the sums, and in those of its row (across) and of its column (down). An error of a row's
  /// sum is one of all its weights in the gradient, so few columns are added at a time.
  template <bool EDGE>
  void add(const Block<T>& b, int64_t p, int64_t columns, const T* k, const T* l, T* down) {
    constexpr int64_t kFew = 24;
    const int64_t first = b.row + p * NR;
    const T *a = sides_.offsets(0), *c = sides_.offsets(1);
    T *across_k = across(b.chunk, 0) + p * NR, *across_l = across(b.chunk, 1) + p * NR;
    for (int lane = 0; lane < NR; ++lane) across_k[lane] = across_l[lane] = 0;
    Vec<T> own_a[P::kVectors], own_c[P::kVectors], sums[kSums] = {};
#pragma GCC unroll 2
    for (int v = 0; v < P::kVectors; ++v) own_a[v] = load(a + first + v * L), own_c[v] = load(c + first + v * L);
    for (int64_t begin = 0; begin < columns; begin += kFew) {
      const int64_t end = begin + kFew < columns ? begin + kFew : columns;
      Vec<T> sum_k[P::kVectors] = {}, sum_l[P::kVectors] = {};
      for (int64_t j = begin; j < end; ++j) {
        const Vec<T> other_a = splat<T>(a[b.column + j]), other_c = splat<T>(c[b.column + j]);
        Vec<T> down_k = load(down + j * L), down_l = load(down + (b.columns + j) * L);
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) {
          Vec<T> own = load(k + j * NR + v * L) - own_a[v] - other_a;
          Vec<T> other = load(l + j * NR + v * L) - own_c[v] - other_c;
          if constexpr (EDGE) {
            const Lanes<T> lanes(first + v * L, b.column + j, sides_.n);
            own = select(lanes.below, own, Vec<T>{});
            other = select(lanes.below, other, Vec<T>{});
          }
          sums[0] += own * other;
          sums[1] += own * own;
          sums[2] += other * other;
          sum_k[v] += own, sum_l[v] += other;
          down_k += own, down_l += other;
        }
        store(down + j * L, down_k);
        store(down + (b.columns + j) * L, down_l);
      }
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) {
        store(across_k + v * L, load(across_k + v * L) + sum_k[v]);
        store(across_l + v * L, load(across_l + v * L) + sum_l[v]);
      }
    }
#pragma GCC unroll 3
    for (int i = 0; i < kSums; ++i) chunk_sums_[b.chunk * kSums + i] += 2 * static_cast<double>(hsum<T>(sums[i]));
  }

  const Sides<T>& sides_;
  Buffer<double> chunk_sums_;
  Buffer<T> across_;     // [chunk][side][row of the strip]
  Buffer<double> rows_;  // [side][row]: sums over all columns; a chunk adds to its own columns' rows
};

/// a of a few columns, evenly spaced: an odd step meets every class of points that lie in turns.
template <class T>
void guess_offsets(const Rows& points, const Program& program, int threads, double* offsets) {
  constexpr int64_t kColumns = 64;
  const int64_t n = points.n, step = n < 2 * kColumns ? 1 : (n / kColumns - 1) | 1;
  const T one = 1;
  Rows columns = points, ones = points;
  columns.n = ceil_div(n, step);
  columns.row_stride *= step;
  ones.data = &one, ones.n = columns.n, ones.d = 1, ones.row_stride = 0;
  ones.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  Buffer<T> sums(n);
  const MatmulParams<T> product{points, columns, ones, &program, false, sums.get(), threads};
  NEARFAR_ISA::matmul(&product, 1);
  const double count = static_cast<double>(columns.n);
  double mean = 0;
  for (int64_t i = 0; i < n; i += step) mean += static_cast<double>(sums[i]) / count;
  for (int64_t i = 0; i < n; ++i) offsets[i] = static_cast<double>(sums[i]) / count - mean / count / 2;
}

template <class T>
void value(const HsicParams<T>& p) {
  const int64_t n = p.points[0].n;
  Buffer<double> guess(kSides * n);
  for (int side = 0; side < kSides; ++side)
    guess_offsets<T>(p.points[side], *p.program[side], p.threads, guess.get() + side * n);
  // As they will be subtracted.
  for (int64_t i = 0; i < kSides * n; ++i) guess[i] = static_cast<double>(static_cast<T>(guess[i]));
  const Sides<T> sides(p, guess.get(), false, false);
  SumCell<T> cell(sides);
  typename Sides<T>::template Passes<SumCell<T>> passes;
  for (const Scores<T>& scores : sides.scores)
    for (int s = 0; s < scores.count; ++s) passes.add(scores[s], cell, sides.plan);
  InStep::run(passes, sides.count(), cell);
  cell.finish(guess.get(), p.values);
}

// ---- their gradient ------------------------------------------------------------------------------------------------

template <class T>
class GradCell {
  using P = Policy<T>;
  static constexpr int NR = P::NR, L = kLanes<T>;
  static constexpr int64_t kRun = Evaluator<T>::kRun;
  static_assert(kRun % NR == 0, "whole columns");

 public:
  static constexpr bool kScores = true;

  GradCell(const Sides<T>& sides, const HsicGradParams<T>& p)
      : sides_(sides),
        p_(p),
        sums_{ParameterSums(p.dparameters[0], *p.program[0], sides.chunks().count),
              ParameterSums(p.dparameters[1], *p.program[1], sides.chunks().count)} {
    // Every pair of the triangle stands for two.
    by_other_ = static_cast<T>(2 * p.grad[0]);
    // What is cut from an offset is the same error in a whole row of weights.
    const auto cut = [&](int side, int64_t i) {
      return p.values[3 + side * sides.n + i] - static_cast<double>(sides.offsets(side)[i]);
    };
    for (int side = 0; side < kSides; ++side) {
      by_own_[side] = static_cast<T>(4 * p.grad[1 + side]);
      sides.fill(rest_[side], [&](int64_t i) {
        return -static_cast<double>(by_own_[side]) * cut(side, i) - static_cast<double>(by_other_) * cut(1 - side, i);
      });
    }
  }

  void map(const Block<T>* blocks) {
    const Block<T>& b = blocks[0];
    typename Evaluator<T>::Sweep sweeps[kSides] = {sides_.evaluators[0].sweep(), sides_.evaluators[1].sweep()};
    alignas(64) T upstream[kSides][kRun];
    for (int64_t p = 0; p < b.panels; ++p) {
      const int64_t columns = b.columns_below(p), size = columns * NR;
      const bool edge = sides_.at_edge(b, p, columns);
      T* tiles[kSides][Program::kScores];
      sides_.tiles_of(blocks, p, tiles);
      for (int64_t k = 0; k < size; k += kRun) {
        const int64_t run = size - k < kRun ? size - k : kRun;
        const T* values[kSides];
        for (int side = 0; side < kSides; ++side)
          values[side] = sides_.evaluators[side].evaluate(tiles[side], k, run, sweeps[side]);
        const int64_t first = b.row + p * NR, column = b.column + k / NR;
        if (edge)
          weigh<true>(first, column, run, values, upstream);
        else
          weigh<false>(first, column, run, values, upstream);
        for (int side = 0; side < kSides; ++side)
          if (p_.dpoints[side] || sums_[side])
            sides_.evaluators[side].pull(tiles[side], upstream[side], k, run, sweeps[side], sums_[side].of(b.chunk));
      }
      for (int side = 0; side < kSides; ++side)
        for (int s = 0; s < sides_.scores[side].count; ++s)
          for (int64_t k = size; k < b.columns * NR; ++k) tiles[side][s][k] = 0;
    }
  }
  void close(int64_t, int64_t, int64_t) {}

  void finish() const {
    for (const ParameterSums& sums : sums_) sums.finish();
  }

 private:
  /// Upstream gradients of both kernels' values of a run of columns: 0 above the diagonal, once on it.
  template <bool EDGE>
  void weigh(int64_t first, int64_t column, int64_t run, const T* const (&values)[kSides],
             T (&upstream)[kSides][kRun]) const {
    const T *a = sides_.offsets(0), *c = sides_.offsets(1);
    const T once = sides_.diagonal ? T(0.5) : T(0);
    for (int v = 0; v < P::kVectors; ++v) {
      const Vec<T> own_a = load(a + first + v * L), own_c = load(c + first + v * L);
      const Vec<T> own_k = load(rest_[0].get() + first + v * L), own_l = load(rest_[1].get() + first + v * L);
      for (int64_t j = 0; j < run / NR; ++j) {
        const int64_t at = j * NR + v * L;
        const Vec<T> k = load(values[0] + at) - own_a - splat<T>(a[column + j]);
        const Vec<T> l = load(values[1] + at) - own_c - splat<T>(c[column + j]);
        Vec<T> by_k = own_k + splat<T>(rest_[0][column + j]), by_l = own_l + splat<T>(rest_[1][column + j]);
        by_k += splat<T>(by_other_) * l + splat<T>(by_own_[0]) * k;
        by_l += splat<T>(by_other_) * k + splat<T>(by_own_[1]) * l;
        if constexpr (EDGE) {
          const Lanes<T> lanes(first + v * L, column + j, sides_.n);
          by_k = select(lanes.below, by_k, select(lanes.on, by_k * splat<T>(once), Vec<T>{}));
          by_l = select(lanes.below, by_l, select(lanes.on, by_l * splat<T>(once), Vec<T>{}));
        }
        store(upstream[0] + at, by_k);
        store(upstream[1] + at, by_l);
      }
    }
  }

  const Sides<T>& sides_;
  const HsicGradParams<T>& p_;
  T by_own_[kSides], by_other_;
  Buffer<T> rest_[kSides];  // of the weights, by row or column
  const ParameterSums sums_[kSides];
};

template <class T>
void gradient(const HsicGradParams<T>& p) {
  const Sides<T> sides(p, p.values + 3, p.dpoints[0] != nullptr, p.dpoints[1] != nullptr);
  GradCell<T> cell(sides, p);
  typename Sides<T>::template Passes<GradCell<T>> passes;
  auto passes_of = [&](int side) {
    return ScorePasses<T, GradCell<T>>(*p.program[side], sides.scores[side], p.points[side].d, p.dpoints[side],
                                       p.dpoints[side], cell, sides.plan, passes);
  };
  ScorePasses<T, GradCell<T>> own[kSides] = {passes_of(0), passes_of(1)};
  InStep::run(passes, sides.count(), cell);
  cell.finish();
  for (auto& passes_of_side : own) passes_of_side.finish();
}

}  // namespace

namespace NEARFAR_ISA {
void hsic(const HsicParams<float>& p) { value(p); }
void hsic(const HsicParams<double>& p) { value(p); }
void hsic_grad(const HsicGradParams<float>& p) { gradient(p); }
void hsic_grad(const HsicGradParams<double>& p) { gradient(p); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
