// What losses over pairs share: numbers that may be on the device, sums of the rows of a tile, and how the parts of a
// row's tiles are merged, in an order that their number decides.
#pragma once

#include "cuda/ops.hpp"
#include "cuda/strip.hpp"
#include "pairwise/reduce.hpp"

namespace nearfar {
inline namespace device {

/// A number of the call, or of the device where `at` is there.
struct Number {
  const double* at;
  double value;
  NEARFAR_DEVICE double operator()() const { return at ? *at : value; }
};

/// The multiplier of dot products. One that is not positive is NaN.
struct Multiplier {
  Number number;
  NEARFAR_DEVICE double operator()() const {
    const double scale = number();
    return scale > 0 ? scale : not_a_number<double>();
  }
};

// ---- rows of a tile
// --------------------------------------------------------------------------------------------------

/// K numbers of every row of a tile, from each of the warps that share it. Small: tiles leave little shared memory.
template <class P, int K>
struct RowParts {
  typename P::T of[P::kWarpsN][K][P::kM];
};
template <class P, int K>
NEARFAR_DEVICE RowParts<P, K>& row_parts() {
  NEARFAR_SHARED RowParts<P, K> parts;
  return parts;
}

/// terms(a, sums) gives K numbers of a thread's part of row a; place(row of the tile, totals) is called once for every
/// row, by one thread.
template <class P, int K, class Terms, class Place>
NEARFAR_DEVICE void reduce_sums(Terms terms, Place place) {
  using T = typename P::T;
  RowParts<P, K>& parts = row_parts<P, K>();
  NEARFAR_UNROLL
  for (int a = 0; a < P::kRows; ++a) {
    T sums[K];
    terms(a, sums);
    NEARFAR_UNROLL
    for (int k = 0; k < K; ++k) {
      sums[k] = sum_of_row<P>(sums[k]);
      if (first_of_row<P>()) parts.of[P::warp_n()][k][P::row(a)] = sums[k];
    }
  }
  cuda::sync_block();
  for (int i = cuda::thread_index(); i < P::kM; i += cuda::kThreads) {
    T totals[K];
    NEARFAR_UNROLL
    for (int k = 0; k < K; ++k) {
      totals[k] = 0;
      for (int warp = 0; warp < P::kWarpsN; ++warp) totals[k] += parts.of[warp][k][i];
    }
    place(i, totals);
  }
  cuda::sync_block();
}

// ---- rows of tiles
// ---------------------------------------------------------------------------------------------------

/// sums[line] += the parts of the line: a warp each.
template <class T>
struct MergeSums {
  const T* partial;
  int64_t parts, lines;
  double* sums;

  NEARFAR_DEVICE void operator()() const {
    const int64_t line = cuda::global_warp();
    if (line >= lines) return;
    double sum = 0;
    for (int64_t part = cuda::lane_index(); part < parts; part += cuda::kWarp)
      sum += static_cast<double>(partial[line * parts + part]);
    sum = cuda::warp_sum(sum);
    if (cuda::lane_index() == 0) sums[line] += sum;
  }
};

/// The same of log-sum-exps, `terms` for every row. The bases of every third one are still to be multiplied by `power`.
template <class T>
struct MergeLogSumExps {
  const PartialSum<T>* partial;
  int64_t parts, lines;
  int terms;
  double power;
  LogSumExp* states;

  NEARFAR_DEVICE void operator()() const {
    const int64_t line = cuda::global_warp();
    if (line >= lines) return;
    const double factor = line % terms == 2 ? power : 1;
    LogSumExp state;
    for (int64_t part = cuda::lane_index(); part < parts; part += cuda::kWarp) {
      const PartialSum<T> own = partial[line * parts + part];
      state.add(factor * static_cast<double>(own.m), static_cast<double>(own.s));
    }
    for (int mask = 1; mask < cuda::kWarp; mask *= 2) {
      LogSumExp other;
      other.m = cuda::shuffle_xor(state.m, mask);
      other.s = cuda::shuffle_xor(state.s, mask);
      // Both lanes merge in the same order, so that they agree.
      const bool upper = cuda::lane_index() & mask;
      LogSumExp merged = upper ? other : state;
      merged.merge(upper ? state : other);
      state = merged;
    }
    if (cuda::lane_index() != 0) return;
    LogSumExp total = states[line];
    total.merge(state);
    states[line] = total;
  }
};

struct StartStates {
  int64_t count;
  LogSumExp* states;
  NEARFAR_DEVICE void operator()() const {
    const int64_t k = cuda::global_thread();
    if (k < count) states[k] = LogSumExp();
  }
};
struct StoreStates {
  int64_t count;
  const LogSumExp* states;
  double* lse;
  NEARFAR_DEVICE void operator()() const {
    const int64_t k = cuda::global_thread();
    if (k < count) lse[k] = states[k].value();
  }
};

/// A block of pairs, its plan, and how its tiles lie in it.
template <class T, class E>
struct TiledBlock {
  Block block;
  Plan plan;
  int64_t tiles_n, valid;  // rows of x in it

  TiledBlock(const cuda::Context& c, const char* operation, const Pairs<T, E>& pairs, const Block& b)
      : block(b),
        plan(plan_scores(c, operation, pairs, b)),
        tiles_n(ceil_div(b.columns, plan.tile)),
        valid(b.rows < pairs.x.n - b.row ? b.rows : pairs.x.n - b.row) {}
};

/// sum_ij (dL/ds_ij) s_ij = sum_i <x_i, dx_i> for rows before the projection, over scale; `counted`: how often every
/// score is in it.
struct ScaleSlope {
  OrderedSum along;
  Multiplier multiplier;
  double counted;
  double* out;
  NEARFAR_DEVICE void operator()() const {
    const double total = along();
    if (cuda::thread_index() == 0) *out = total / (counted * multiplier());
  }
};

/// The last step of rows of a gradient by the scores' multiplier; along null: not wanted.
template <class T>
FinishRows<T> finish_scaled(const Multiplier& multiplier, double* along) {
  FinishRows<T> step{};
  step.scale = multiplier.number.at;
  step.multiply = multiplier.number.at ? 1 : multiplier.number.value;
  step.along = along;
  return step;
}

}  // namespace device
}  // namespace nearfar
