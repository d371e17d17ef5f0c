// Sums of products of two centred kernel matrices, and their gradient: see cpu/ops/hsic.cpp. Here all pairs are taken,
// by strips of both matrices: so rows have their sums, and one product with the symmetric weights is the whole
// gradient.
//
// Pairs are centred and summed in double: what is cut from an offset would be the same error in a whole row.
#include "cuda/ops.hpp"
#include "cuda/program_gradient.hpp"

namespace nearfar {
namespace {

using cuda::HsicDevice;
using cuda::HsicGradDevice;

constexpr int kSides = 2;  // x with its kernel, y with its own
constexpr int kSums = 3;   // of K' L', K'^2, L'^2

/// Entries of both centred matrices, of the pairs that have any.
struct Centred {
  const double* offsets;  // [side][row]
  int64_t n;
  bool diagonal;

  NEARFAR_DEVICE bool has(int64_t i, int64_t j) const { return i < n && j < n && (diagonal || i != j); }
  template <class T>
  NEARFAR_DEVICE double operator()(int side, int64_t i, int64_t j, T value) const {
    return static_cast<double>(value) - offsets[side * n + i] - offsets[side * n + j];
  }
};

// ---- the sums ------------------------------------------------------------------------------------------------------

/// A row's numbers, and their sums over rows; numbers lie by quantity, then by row.
enum Quantity : int { kProducts, kOwnSquares, kOtherSquares, kOwn, kOther, kQuantities };

/// Adds to the numbers of every row its pairs in a block: a warp a row.
template <class T>
struct AddRowSums {
  Weights<T> k, l;
  Centred centred;
  double* rows;

  NEARFAR_DEVICE void operator()() const {
    const Block& b = k.block;
    const int64_t i = b.row + cuda::global_warp(), n = centred.n;
    if (i >= b.row + b.rows || i >= n) return;
    const int64_t end = b.column + b.columns < n ? b.column + b.columns : n;
    double sums[kQuantities] = {};
    NEARFAR_UNROLL_4
    for (int64_t j = b.column + cuda::lane_index(); j < end; j += cuda::kWarp) {
      if (!centred.has(i, j)) continue;
      const double own = centred(0, i, j, k.at(i, j)), other = centred(1, i, j, l.at(i, j));
      sums[kProducts] += own * other;
      sums[kOwnSquares] += own * own;
      sums[kOtherSquares] += other * other;
      sums[kOwn] += own;
      sums[kOther] += other;
    }
    NEARFAR_UNROLL
    for (int q = 0; q < kQuantities; ++q) {
      const double sum = cuda::warp_sum(sums[q]);
      if (cuda::lane_index() == 0) rows[q * n + i] += sum;
    }
  }
};

/// The sums, with those of the rows' remainders taken out; what these add up to is left in `totals`. One block.
struct FinishSums {
  const double* rows;
  int64_t n;
  double p, q;
  double *totals, *values;

  NEARFAR_DEVICE void operator()() const {
    double sums[kQuantities] = {}, products[kSums] = {};
    for (int64_t i = cuda::thread_index(); i < n; i += cuda::kThreads) {
      const double own = rows[kOwn * n + i], other = rows[kOther * n + i];
      for (int k = 0; k < kQuantities; ++k) sums[k] += rows[k * n + i];
      products[kProducts] += own * other;
      products[kOwnSquares] += own * own;
      products[kOtherSquares] += other * other;
    }
    for (double& sum : sums) sum = block_sum(sum);
    for (double& product : products) product = block_sum(product);
    if (cuda::thread_index() != 0) return;
    const double own = sums[kOwn], other = sums[kOther], squares[kSums] = {own * other, own * own, other * other};
    for (int k = 0; k < kSums; ++k) values[k] = sums[k] - 2 / p * products[k] + squares[k] / q;
    totals[0] = own, totals[1] = other;
  }
};

/// The offsets of both sides, with the rows' remainders in.
struct FinishOffsets {
  const double *guess, *rows, *totals;
  int64_t n;
  double p, q;
  double* offsets;
  NEARFAR_DEVICE void operator()() const {
    const int64_t at = cuda::global_thread();
    if (at < kSides * n) offsets[at] = guess[at] + rows[kOwn * n + at] / p - totals[at / n] / (2 * q);
  }
};

/// A guess of the offsets of one side from the sums of some columns, `count` of the rows `step` apart.
template <class T>
struct GuessOffsets {
  const T* sums;
  int64_t n, step, count;
  double* offsets;
  NEARFAR_DEVICE void operator()() const {
    double mean = 0;
    for (int64_t k = cuda::thread_index(); k < count; k += cuda::kThreads) mean += static_cast<double>(sums[k * step]);
    const double columns = static_cast<double>(count);
    mean = block_sum(mean) / columns / columns;
    const int64_t i = cuda::global_thread();
    if (i < n) offsets[i] = static_cast<double>(sums[i]) / columns - mean / 2;
  }
};

template <class T>
void guess_offsets(cuda::Context& c, const HsicDevice<T>& p, int side, double* offsets) {
  constexpr int64_t kColumns = 64;
  const Rows& points = p.points[side];
  const int64_t n = points.n, step = n < 2 * kColumns ? 1 : (n / kColumns - 1) | 1;
  T *one = c.take<T>(1), *sums = c.take<T>(n);
  c.launch_threads(1, Fill<T>{one, 1, T(1)});
  cuda::MatmulDevice<T> product{};
  product.x = product.y = product.v = points;
  product.y.n = product.v.n = ceil_div(n, step);
  product.y.row_stride *= step;
  product.v.data = one, product.v.d = 1, product.v.row_stride = 0;
  product.v.dtype = sizeof(T) == 8 ? DType::f64 : DType::f32;
  product.program = p.program[side];
  product.parameters_at = p.parameters_at[side];
  product.out = sums;
  cuda::matmul(c, product);
  c.launch_threads(n, GuessOffsets<T>{sums, n, step, product.y.n, offsets});
}

// ---- their gradient ------------------------------------------------------------------------------------------------

/// The pulls of both sides' scores, in the place of these. The weight of a pair is twice its share, as it is that of
/// its row and of its column.
template <class T>
struct WeighPairs {
  PairScores<T> pairs[kSides];
  ParameterSums parameters[kSides];
  bool wanted[kSides];
  Centred centred;
  const double* grad;

  NEARFAR_DEVICE void operator()() const {
    double room[kSides][Program::kParameters], *sums[kSides];
    for (int side = 0; side < kSides; ++side) sums[side] = parameters[side].begin(room[side]);
    const double by_other = 2 * grad[0], by_own[kSides] = {4 * grad[1], 4 * grad[2]};
    for_pairs(pairs[0].score[0].block, [&](int64_t i, int64_t j) {
      if (!centred.has(i, j)) {
        for (const PairScores<T>& own : pairs) own.clear(i, j);
        return;
      }
      T registers[kSides][PairScores<T>::kRegisters];
      double entry[kSides];
      for (int side = 0; side < kSides; ++side)
        entry[side] = centred(side, i, j, pairs[side].value(i, j, registers[side]));
      for (int side = 0; side < kSides; ++side) {
        const double weight = by_other * entry[1 - side] + by_own[side] * entry[side];
        if (wanted[side]) pairs[side].pull(i, j, registers[side], static_cast<T>(weight), sums[side]);
      }
    });
    for (int side = 0; side < kSides; ++side) parameters[side].end(room[side]);
  }
};

}  // namespace

namespace cuda {

template <class T>
void hsic(Context& c, const HsicDevice<T>& p) {
  const int64_t n = p.points[0].n;
  const double of_row = static_cast<double>(p.diagonal ? n : n - 2);
  const double of_all = p.diagonal ? of_row * of_row : of_row * (of_row + 1);
  double *guess = c.take<double>(kSides * n), *rows = c.take<double>(kQuantities * n), *totals = c.take<double>(kSides);
  c.launch_threads(kQuantities * n, Fill<double>{rows, kQuantities * n, 0});
  std::optional<PackedProgram<T>> kernels[kSides];
  std::optional<Strip<T, T>> strips[kSides];
  for (int side = 0; side < kSides; ++side) {
    guess_offsets(c, p, side, guess + side * n);
    PackedProgram<T>& kernel =
        kernels[side].emplace(c, *p.program[side], p.parameters_at[side], p.points[side], p.points[side], true, false);
    kernel.take_others(strips[side].emplace(c, kernel[0], false, true, nullptr, nullptr).shape);
  }
  strips[0]->for_blocks([&](const Weights<T>& k) {
    const Weights<T> l = strips[1]->open(k.block);
    kernels[0]->values(k, false);
    kernels[1]->values(l, false);
    c.launch_warps(k.block.rows, AddRowSums<T>{k, l, {guess, n, p.diagonal}, rows});
  });
  c.launch(1, FinishSums{rows, n, of_row, of_all, totals, p.values});
  c.launch_threads(kSides * n, FinishOffsets{guess, rows, totals, n, of_row, of_all, p.values + kSums});
}

template <class T>
void hsic_grad(Context& c, const HsicGradDevice<T>& p) {
  const int64_t n = p.points[0].n;
  std::optional<ProgramGradient<T>> sides[kSides];
  for (int side = 0; side < kSides; ++side)
    sides[side].emplace(c, *p.program[side], p.parameters_at[side], p.points[side], p.points[side], true,
                        p.dpoints[side], static_cast<T*>(nullptr), p.dparameters[side]);
  sides[0]->for_blocks([&](const Block& block) {
    WeighPairs<T> weigh{{sides[0]->open(block), sides[1]->open(block)},
                        {sides[0]->parameters(), sides[1]->parameters()},
                        {sides[0]->wanted(), sides[1]->wanted()},
                        {p.values + kSums, n, p.diagonal},
                        p.grad};
    for (int side = 0; side < kSides; ++side) sides[side]->put_scores(weigh.pairs[side]);
    c.launch(pair_blocks(block), weigh);
    for (int side = 0; side < kSides; ++side) sides[side]->close(weigh.pairs[side], 0.5);
  });
  for (auto& side : sides) side->finish();
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(hsic, HsicDevice)
NEARFAR_INSTANTIATE(hsic_grad, HsicGradDevice)
