// Scores of pairs from the engine's products, and the launch of a block of them.
#pragma once

#include "cuda/plan.hpp"
#include "cuda/wgmma_wide.hpp"

namespace nearfar {
inline namespace device {

/// A part of all pairs: rows of x against rows of y, whole tiles.
struct Block {
  int64_t row, rows, column, columns;
};

/// Bits of a tile's pairs that lie past the n rows or m columns of the sets.
template <class P>
NEARFAR_DEVICE uint64_t outside(const Fragment<P>& f, const Block& b, int64_t n, int64_t m) {
  return f.without(b.row + f.i0 + P::kM <= n && b.column + f.j0 + P::kN <= m,
                   [&](int64_t i, int64_t j) { return b.row + i < n && b.column + j < m; });
}

/// Inner products of packed rows, and with `distance` squared distances that survive cancellation: see
/// cpu/operands.hpp.
template <class T>
struct Scores {
  Source<T> x, y;
  const T *x_factor, *y_factor;    // null: 1
  const T *x_squares, *y_squares;  // of packed rows, for distances
  bool distance, direct;
  T near_part;  // of |x|^2 + |y|^2: pairs as near as this are measured

  /// Of a pair.
  NEARFAR_DEVICE T operator()(int64_t i, int64_t j, T product) const {
    return x_factor ? product * (x_factor[i] * y_factor[j]) : product;
  }
  NEARFAR_DEVICE bool near(int64_t i, int64_t j, T square) const {
    return square <= (x_squares[i] + y_squares[j]) * near_part;
  }
  /// The products of a tile that begins at (i0, j0) of the sets become scores; bits of near pairs, which are measured.
  /// `hidden` pairs are none. Padding has numbers too, so there is no bound.
  template <class P>
  NEARFAR_DEVICE uint64_t apply(const Fragment<P>& f, int64_t i0, int64_t j0, uint64_t hidden) const {
    if (x_factor) f.for_each(x_factor + i0, y_factor + j0, [](T& value, T x, T y) { value *= x * y; });
    if (!distance) return 0;
    const T *x = x_squares + i0, *y = y_squares + j0;
    if (!direct) f.for_each(x, y, [](T& value, T u, T v) { value = (u + v) - 2 * value; });
    bool any = false;
    f.for_each(x, y, [&](T value, T u, T v) { any |= value <= (u + v) * near_part; });
    if (!any) return 0;
    const uint64_t near =
        f.find([&](int a, int b) { return f(a, b) <= (x[P::row(a)] + y[P::col(b)]) * near_part; }) & ~hidden;
    if (!direct) f.for_bits(near, [&](int a, int b) { f.set(a, b, measure(i0 + P::row(a), j0 + P::col(b))); });
    return near;
  }
  NEARFAR_DEVICE T measure(int64_t i, int64_t j) const { return direct_distance(x, y, i, j); }
};

/// What packed rows are for, but for gradients: nothing else; `launch_scores`; or that to order the columns of a row,
/// which takes norms also of dot products (nearest.hpp).
enum class PairUse { rows, scores, ranks };

/// Both point sets, packed. E is the type of packed rows; y packed may be x packed.
template <class T, class E>
struct Pairs {
  Packed<T, E> x, y;
  Scores<T> scores;

  /// products: packed rows are also multiplied by weights, so distances must be centred in any case.
  /// blocked: the operation's epilogues store weights by `Weights::store` only, so that 16-bit rows may be blocked.
  Pairs(cuda::Context& c, const Rows& x_rows, const Rows& y_rows, bool normalize, bool distance, bool products,
        bool blocked = false, PairUse use = PairUse::scores) {
    const bool same = same_rows(x_rows, y_rows);
    const Source<T> of_y = source_of<T>(c, y_rows, normalize);
    const Source<T> of_x = same ? of_y : source_of<T>(c, x_rows, normalize);
    const bool direct = distance && x_rows.d <= kDirectDims;
    // 16-bit rows lose what they have no room for, far from zero next to nothing, and only ranks allow for it.
    constexpr double kFar = sizeof(E) == 2 ? 4 : 0;
    const bool centered = distance && (sizeof(E) == 2 ? use == PairUse::ranks && !normalize : products || !direct);
    const T* center = centered ? center_of(c, of_y, kFar) : nullptr;
    const bool split =
        std::is_same_v<E, float> && use != PairUse::rows && !direct && splits_rows(c, x_rows.n, y_rows.n, x_rows.d);
    const bool by_blocks = blocked && blocks_rows<E>(c), squares = distance || use == PairUse::ranks;
    y = pack<E>(c, of_y, center, squares, by_blocks, split);
    x = same ? y : pack<E>(c, of_x, center, squares, by_blocks, split);
    scores = {of_x, of_y, x.factor, y.factor, x.squares, y.squares, distance, direct, split ? kNearSplit : kNear<T>};
  }
  Block all() const { return {0, x.padded, 0, y.padded}; }
  bool blocked() const { return x.blocked; }
  bool split() const { return x.split.data; }
};

/// The epilogue's tile size, for who stores something per tile.
template <class T, class E>
Plan plan_scores(const cuda::Context& c, const char* operation, const Pairs<T, E>& pairs, const Block& block) {
  Plan own = plan<E>(c, operation, block.rows, block.columns, pairs.x.d, false, pairs.blocked(), pairs.split());
  if (pairs.scores.direct) own.tile = 64, own.policy = "simt, differences";
  return own;
}

/// Epilogues that know tiles of blocked rows say so (`kBlocked`).
template <class Epilogue, class = void>
struct KnowsBlocked : std::false_type {};
template <class Epilogue>
struct KnowsBlocked<Epilogue, std::void_t<decltype(Epilogue::kBlocked)>> : std::true_type {};

/// Those that are compiled for wgmma_overlap.hpp too say that as well (`kOverlaps`).
template <class Epilogue, class = void>
struct Overlaps : std::false_type {};
template <class Epilogue>
struct Overlaps<Epilogue, std::void_t<decltype(Epilogue::kOverlaps)>> : std::true_type {};

/// Of blocked rows.
template <class T, class E, class Epilogue>
void launch_blocked(cuda::Context& c, const Pairs<T, E>& pairs, const Block& b, const Epilogue& epilogue) {
  const BlockedOperand<true, E> x{pairs.x.blocks(b.row / Blocked::kRows)}, y{pairs.y.blocks(b.column / Blocked::kRows)};
  const int64_t tiles_m = ceil_div(b.rows, Blocked::kRows), tiles_n = ceil_div(b.columns, Blocked::kRows);
  const int64_t steps = ceil_div(pairs.x.d, Blocked::kColumns);
  if constexpr (Overlaps<Epilogue>::value)
    if (overlaps<E>(c, b.rows, b.columns, pairs.x.d)) return launch_overlap(c, x, y, tiles_m, tiles_n, steps, epilogue);
  launch_wide<WgmmaTwin<E>>(c, x, y, tiles_n, tiles_m, ceil_div(tiles_n, 2), steps, 1, epilogue);
}

template <class T, class E, class Epilogue>
void launch_scores(cuda::Context& c, const Plan& plan, const Pairs<T, E>& pairs, const Block& b,
                   const Epilogue& epilogue) {
  if constexpr (sizeof(E) == 2 && KnowsBlocked<Epilogue>::value) {
    if (pairs.blocked()) return launch_blocked(c, pairs, b, epilogue);
  }
  if constexpr (std::is_same_v<E, float>) {
    if (pairs.split()) {
      constexpr int64_t kRows = SplitBlocked::kRows;
      const BlockedOperand<true, float> x{pairs.x.splits(b.row / kRows), static_cast<int>(b.row / kRows)},
          y{pairs.y.splits(b.column / kRows), static_cast<int>(b.column / kRows)};
      return launch_wgmma(c, x, y, ceil_div(b.rows, kRows), ceil_div(b.columns, kRows),
                          ceil_div(pairs.x.d, SplitBlocked::kColumns), epilogue);
    }
  }
  const Operand<E, true> x{pairs.x.data + b.row * pairs.x.pitch, pairs.x.pitch};
  const Operand<E, true> y{pairs.y.data + b.column * pairs.y.pitch, pairs.y.pitch};
  auto run = [&](auto policy) { launch_tiles<decltype(policy)>(c, x, y, b.rows, b.columns, pairs.x.d, 1, epilogue); };
  if constexpr (std::is_same_v<E, T> && Epilogue::kDistances) {
    if (pairs.scores.direct) return run(Simt<SquaredDifference, T, 64>{});
  }
  with_score_policy<E>(c, plan, run);
}

// ---- maps by name
// ----------------------------------------------------------------------------------------------------

inline bool is_distance(PairMap map) { return map != PairMap::dot && map != PairMap::one_minus_dot; }

template <class T>
NEARFAR_DEVICE T map_value(PairMap map, T score) {
  switch (map) {
    case PairMap::dot:
      return DotMap::value(score);
    case PairMap::one_minus_dot:
      return OneMinusDotMap::value(score);
    case PairMap::sqeuclidean:
      return SquaredEuclideanMap::value(score);
    case PairMap::euclidean:
      return EuclideanMap::value(score);
    default:
      return score;  // those of coordinate.hpp
  }
}
template <class T>
NEARFAR_DEVICE T map_pull(PairMap map, T value) {
  switch (map) {
    case PairMap::dot:
      return DotMap::pull(value);
    case PairMap::one_minus_dot:
      return OneMinusDotMap::pull(value);
    case PairMap::sqeuclidean:
      return SquaredEuclideanMap::pull(value);
    case PairMap::euclidean:
      return EuclideanMap::pull(value);
    default:
      return value;
  }
}
/// The squared distance again, from the value.
template <class T>
NEARFAR_DEVICE T map_score(PairMap map, T value) {
  switch (map) {
    case PairMap::euclidean:
      return EuclideanMap::score(value);
    default:
      return value;
  }
}

}  // namespace device
}  // namespace nearfar
