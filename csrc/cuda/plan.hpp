// Which policy and tile a product takes: a pure function of its shape, its operand type and the device.
// NEARFAR_CUDA_PLAN=1 prints every choice. NEARFAR_CUDA_SPLIT=0 keeps float32 rows from Hopper's tensor cores, 1 sends
// all of them there; else those that gain. NEARFAR_CUDA_OVERLAP=1 lets Hopper's tensor cores multiply during the
// epilogues of softmax losses of 16-bit rows of at most 256 numbers; not the default, because no GPU has timed it.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "cuda/mma.hpp"
#include "cuda/simt.hpp"
#include "cuda/wgmma_overlap.hpp"

namespace nearfar {
inline namespace device {

struct Plan {
  const char* operation;
  const char* policy;
  int tile;
  int64_t splits;      // of the depth
  int columns = tile;  // of a tile
};

template <class E>
constexpr const char* name_of_element() {
  return sizeof(E) == 8 ? "float64" : sizeof(E) == 4 ? "float32" : std::is_same_v<E, BF16> ? "bfloat16" : "float16";
}

/// Does E go to the tensor cores?
template <class E>
bool on_tensor_cores(bool exact) {
  return sizeof(E) == 2 || (sizeof(E) == 4 && !exact);
}

/// Do scores of float32 rows come from Hopper's tensor cores, by three products of tf32 (wgmma.hpp), and products of
/// weights with them, by three of float16 (wgmma_weights.hpp)? They keep float32 accuracy, and are worth it where tiles
/// fill the device.
inline bool splits_rows(const cuda::Context& c, int64_t n, int64_t m, int64_t d) {
  if (!c.hopper() || !c.exact || d == 0) return false;
  const char* wanted = std::getenv("NEARFAR_CUDA_SPLIT");
  if (wanted && (*wanted == '0' || *wanted == '1')) return *wanted == '1';
  return d > kDirectDims && ceil_div(n, 128) * ceil_div(m, 128) >= c.device.multiprocessors;
}

/// Do products of packed rows, and of weights with them, go to Hopper's tensor cores by blocks (wgmma.hpp)? Weights are
/// then of the rows' type.
template <class E>
bool blocks_rows(const cuda::Context& c) {
  return sizeof(E) == 2 && c.hopper();
}

template <class E>
void print_plan(const cuda::Context& c, const Plan& plan, int64_t rows, int64_t columns, int64_t depth) {
  static const bool print = [] {
    const char* value = std::getenv("NEARFAR_CUDA_PLAN");
    return value && *value && *value != '0';
  }();
  if (!print || c.measuring()) return;
  std::fprintf(stderr, "nearfar: %s %lld x %lld x %lld %s: %s, tile %d x %d, %lld splits (sm_%d, %d multiprocessors)\n",
               plan.operation, static_cast<long long>(rows), static_cast<long long>(columns),
               static_cast<long long>(depth), name_of_element<E>(), plan.policy, plan.tile, plan.columns,
               static_cast<long long>(plan.splits), c.device.architecture, c.device.multiprocessors);
}

/// Do scores of blocked rows take the kernel whose products run during epilogues (wgmma_overlap.hpp)?
template <class E>
bool overlaps(const cuda::Context& c, int64_t rows, int64_t columns, int64_t depth) {
  const char* wanted = std::getenv("NEARFAR_CUDA_OVERLAP");
  if (!wanted || *wanted != '1' || depth == 0 || depth > kOverlapDepth) return false;
  print_plan<E>(c, Plan{"scores", "wgmma during epilogues", 128, 1}, rows, columns, depth);
  return true;
}

constexpr int64_t kLeastDepth = 256, kMostSplits = 32;  // of a part of the depth

/// Large tiles read less, small tiles are more: large where they fill the device. float64 has room for small ones only.
template <class E>
Plan plan(const cuda::Context& c, const char* operation, int64_t rows, int64_t columns, int64_t depth, bool split,
          bool blocked = false, bool rows_split = false) {
  Plan plan{operation, on_tensor_cores<E>(c.exact) ? "mma" : "simt", 64, 1};
  const int64_t large = ceil_div(rows, 128) * ceil_div(columns, 128), wanted = c.device.multiprocessors;
  if (sizeof(E) < 8 && large >= wanted) plan.tile = 128;
  if (blocked) plan.policy = "wgmma", plan.tile = 128;
  if (rows_split) plan.policy = "wgmma, 3 x tf32", plan.tile = 128;
  plan.columns = plan.tile;
  const int64_t tiles = ceil_div(rows, plan.tile) * ceil_div(columns, plan.tile);
  if (split && tiles > 0 && tiles < 2 * wanted) {
    plan.splits = ceil_div(2 * wanted, tiles);
    if (plan.splits > depth / kLeastDepth) plan.splits = depth / kLeastDepth > 0 ? depth / kLeastDepth : 1;
    if (plan.splits > kMostSplits) plan.splits = kMostSplits;
  }
  print_plan<E>(c, plan, rows, columns, depth);
  return plan;
}

struct TileTime {
  int rows, columns;
  int64_t time;  // of a step of 64 of the depth
};
/// The tile and the parts of the depth that take the least time.
template <class E>
Plan plan_tiles(const cuda::Context& c, Plan plan, int64_t rows, int64_t columns, int64_t depth, bool split,
                std::initializer_list<TileTime> tiles_to_try) {
  // An epilogue, and merging what it has left, takes as long as so many steps.
  constexpr int64_t kEpilogue = 12;
  int64_t least = INT64_MAX;
  for (const TileTime& tile : tiles_to_try) {
    const int64_t tiles = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns);
    for (int64_t splits = 1; splits == 1 || (split && splits <= kMostSplits && splits * kLeastDepth <= depth);
         ++splits) {
      const int64_t rounds = ceil_div(tiles * splits, c.device.multiprocessors);
      const int64_t time = rounds * (ceil_div(depth / 64, splits) + kEpilogue) * tile.time;
      if (time < least) least = time, plan.tile = tile.rows, plan.columns = tile.columns, plan.splits = splits;
    }
  }
  print_plan<E>(c, plan, rows, columns, depth);
  return plan;
}
/// Of blocked weights and rows of `columns` numbers (wgmma_wide.hpp).
template <class E>
Plan plan_blocked_product(const cuda::Context& c, const char* operation, int64_t rows, int64_t columns, int64_t depth,
                          bool split) {
  return plan_tiles<E>(c, {operation, "wgmma", 0, 1, 0}, rows, columns, depth, split, {{128, 256, 10}, {256, 128, 11}});
}
/// Of float32 weights and rows in two pieces (wgmma_weights.hpp).
inline Plan plan_split_product(const cuda::Context& c, const char* operation, int64_t rows, int64_t columns,
                               int64_t depth) {
  return plan_tiles<float>(c, {operation, "wgmma, 3 x float16", 0, 1, 0}, rows, columns, depth, true, {{128, 128, 1}});
}

/// f(policy of a product of two packed sets): both operands exact.
template <class E, class F>
void with_score_policy(const cuda::Context& c, const Plan& plan, F f) {
  if constexpr (sizeof(E) == 8) {
    return f(Simt<Dot, double, 64>{});
  } else if constexpr (sizeof(E) == 4) {
    if (c.exact) return plan.tile == 64 ? f(Simt<Dot, float, 64>{}) : f(Simt<Dot, float, 128>{});
    return plan.tile == 64 ? f(Mma<float, 64, 1, true, true>{}) : f(Mma<float, 128, 1, true, true>{});
  } else {
    return plan.tile == 64 ? f(Mma<E, 64, 1, true, true>{}) : f(Mma<E, 128, 1, true, true>{});
  }
}

/// f(policy of weights times packed rows); A_CONTIGUOUS: the weights as they lie, else transposed. These weights of
/// float16 rows have no bound that float16 would need: tf32, which holds the rows exactly.
template <class E, bool A_CONTIGUOUS, class F>
void with_product_policy(const cuda::Context& c, const Plan& plan, F f) {
  if constexpr (sizeof(E) == 8) {
    return f(Simt<Dot, double, 64>{});
  } else if constexpr (sizeof(E) == 4) {
    if (c.exact) return plan.tile == 64 ? f(Simt<Dot, float, 64>{}) : f(Simt<Dot, float, 128>{});
    return plan.tile == 64 ? f(Mma<float, 64, 1, A_CONTIGUOUS, false>{}) : f(Mma<float, 128, 1, A_CONTIGUOUS, false>{});
  } else {
    using M = std::conditional_t<std::is_same_v<E, BF16>, BF16, float>;
    if (c.exact)
      return plan.tile == 64 ? f(Mma<M, 64, 2, A_CONTIGUOUS, false>{}) : f(Mma<M, 128, 2, A_CONTIGUOUS, false>{});
    return plan.tile == 64 ? f(Mma<M, 64, 1, A_CONTIGUOUS, false>{}) : f(Mma<M, 128, 1, A_CONTIGUOUS, false>{});
  }
}

/// f(E{}): what rows are packed as. Distances need a centre, which 16 bits cannot hold.
template <class T, class F>
void with_element(DType dtype, bool distance, F f) {
  if constexpr (sizeof(T) == 8) {
    f(double{});
  } else {
    if (dtype == DType::bf16 && !distance) return f(BF16{});
    if (dtype == DType::f16 && !distance) return f(F16{});
    f(float{});
  }
}

}  // namespace device
}  // namespace nearfar
