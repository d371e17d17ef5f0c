// Multiply on Hopper's tensor cores: blocks (blocked.hpp) through the copy engine, float32 accumulators.
//
// C[i][j] = sum_k A[i][k] B[j][k] as in tile.hpp, with the same epilogues. Tiles of 128 x 128, two warpgroups of 64
// rows; one thread keeps copies of the next steps in flight. Of 16-bit rows, two blocks share a multiprocessor, so that
// one multiplies while the other is in its epilogue; float32 rows in two pieces of tf32 take the memory of both.
#pragma once

#include "cuda/blocked.hpp"
#include "cuda/hopper.hpp"
#include "cuda/tile.hpp"

namespace nearfar {
inline namespace device {

/// An operand: with SUM_COLUMNS, tile t is its t-th 128 rows and a step of the sum a block's columns; else the other
/// way about.
template <bool SUM_COLUMNS, class E>
struct BlockedOperand {
  using Element = E;
  static constexpr bool kSumColumns = SUM_COLUMNS;
  Blocks<std::conditional_t<sizeof(E) == 2, uint16_t, E>> blocks;
  int first = 0;  // the tile of its set with which it begins
};

/// What epilogues see, whatever is multiplied.
struct WgmmaTile {
  using T = float;
  static constexpr int kM = 128, kN = 128, kDepth = 64;
  static constexpr int kRows = 2, kCols = 32, kRowLanes = 4, kWarpsM = 8, kWarpsN = 1;
  struct Accumulators {
    float v[16][4];
  };
  NEARFAR_DEVICE static int warp_m() { return cuda::warp_index(); }
  NEARFAR_DEVICE static int warp_n() { return 0; }
  NEARFAR_DEVICE static int row(int a) { return cuda::warp_index() * 16 + a * 8 + cuda::lane_index() / 4; }
  NEARFAR_DEVICE static int col(int b) { return b / 2 * 8 + b % 2 + cuda::lane_index() % 4 * 2; }
  NEARFAR_DEVICE static float& value(Accumulators& acc, int a, int b) { return acc.v[b / 2][a * 2 + b % 2]; }
  static constexpr int kHalf = 8192;

  /// Step k of tile t.
  template <class Op>
  NEARFAR_DEVICE static void load(char* to, const Op& op, int64_t t, int64_t k, uint64_t* barrier) {
    if (Op::kSumColumns) {
      cuda::bulk_load(to, op.blocks.block(t, k), op.blocks.kBytes, barrier);
    } else {
      for (int half = 0; half < 2; ++half)
        cuda::bulk_load(to + half * kHalf,
                        reinterpret_cast<const char*>(op.blocks.block(k / 2, 2 * t + half)) + k % 2 * kHalf, kHalf,
                        barrier);
    }
  }
  /// 64 (or, from 0, 128) lines of an operand, at 32 bytes of the sum.
  template <class Op>
  NEARFAR_DEVICE static uint64_t view(const char* at, int group, int k) {
    return Op::kSumColumns ? cuda::descriptor(at + group * kHalf + k * 32, 16, 1024)
                           : cuda::descriptor(at + group * kHalf + k * 2048, kHalf, 1024);
  }
};

/// Of bfloat16 or float16.
template <class E>
struct Wgmma : WgmmaTile {
  using Element = E;
  static constexpr int kOperand = Blocked::kBytes, kStage = 2 * kOperand;
  static constexpr int kResident = 2;    // blocks of a multiprocessor
  static constexpr bool kWaits = false;  // is a step's memory free at its end?
  template <class Epilogue>
  static constexpr bool stores() {
    return Epilogue::kStores;
  }

  template <class A, class B>
  NEARFAR_DEVICE static void step(const char* stage, Accumulators& acc, int) {
    const int group = cuda::warp_index() / 4;
    cuda::wgmma_begin();
    NEARFAR_UNROLL
    for (int k = 0; k < 4; ++k)
      cuda::wgmma<E, !A::kSumColumns, !B::kSumColumns>(acc.v, view<A>(stage, group, k),
                                                       view<B>(stage + kOperand, 0, k));
    cuda::wgmma_commit();
  }
};

/// Is P the policy of blocked 16-bit rows? Then float32 accumulators lie as a WgmmaTile says, and an epilogue may store
/// weights by blocks.
template <class P>
struct IsBlocked : std::false_type {};
template <class E>
struct IsBlocked<Wgmma<E>> : std::true_type {};
template <class P>
constexpr bool is_blocked = IsBlocked<P>::value;

/// Scores of float32 rows x = high + low, both tf32: high high' + high low' + low high', which leaves out 2^-22 of a
/// product. Tensor cores cut sums off where others round them, so that long ones lose digits: those of a step start
/// anew, the small products first, and are added to the rest as float32 numbers.
///
/// Sums that are cut off depend on their order, and <x, y> has the bits of <y, x>: of two tiles that mirror each other
/// the one begins with high low', the other with low high'; of one that mirrors itself both are summed apart.
struct WgmmaSplit : WgmmaTile {
  static constexpr int kDepth = SplitBlocked::kColumns, kOperand = SplitBlocked::kBytes, kStage = 2 * kOperand;
  static constexpr int kResident = 1;
  static constexpr bool kWaits = true;
  template <class Epilogue>
  static constexpr bool stores() {
    return false;
  }

  template <class A, class B>
  NEARFAR_DEVICE static void step(const char* stage, Accumulators& acc, int below) {
    const char* other = stage + kOperand;
    constexpr int kLow = kOperand / 2;
    float part[16][4];
    if (below != 0) {
      const int low = below < 0 ? kLow : 0;  // of the first product; the second has it on the other side
      cuda::wgmma_begin();
      multiply<A, B, true>(part, stage + low, other + (kLow - low));
      multiply<A, B, false>(part, stage + (kLow - low), other + low);
      multiply<A, B, false>(part, stage, other);
      finish(part);
    } else {
      float apart[16][4];
      cuda::wgmma_begin();
      multiply<A, B, true>(apart, stage + kLow, other);
      multiply<A, B, true>(part, stage, other + kLow);
      finish(part);
      cuda::wgmma_fence(apart);
      for_each([&](int n, int q) { apart[n][q] += part[n][q]; });
      cuda::wgmma_begin();
      multiply<A, B, true>(part, stage, other);
      finish(part);
      for_each([&](int n, int q) { part[n][q] += apart[n][q]; });
    }
    for_each([&](int n, int q) { acc.v[n][q] += part[n][q]; });
  }

 private:
  template <class A, class B, bool FRESH>
  NEARFAR_DEVICE static void multiply(float (&part)[16][4], const char* a, const char* b) {
    const int group = cuda::warp_index() / 4;
    NEARFAR_UNROLL
    for (int k = 0; k < 4; ++k) cuda::wgmma_tf32(part, view<A>(a, group, k), view<B>(b, 0, k), FRESH && k == 0);
  }
  NEARFAR_DEVICE static void finish(float (&part)[16][4]) {
    cuda::wgmma_commit();
    cuda::wgmma_wait<0>();
    cuda::wgmma_fence(part);
  }
  template <class F>
  NEARFAR_DEVICE static void for_each(F f) {
    NEARFAR_UNROLL
    for (int n = 0; n < 16; ++n) NEARFAR_UNROLL
    for (int q = 0; q < 4; ++q) f(n, q);
  }
};

/// The order of tiles of parts of the depth. Tiles come in groups of GROUP rows, so that those that run together share
/// both operands in the cache. Indices fit 32 bits, and few of them are kept beside the accumulators.
template <int GROUP>
struct TileOrder {
  int tiles_m, tiles_n, steps, splits;

  /// steps: of a block's columns along the sum.
  TileOrder(int64_t tiles_m, int64_t tiles_n, int64_t steps, int64_t splits)
      : tiles_m(static_cast<int>(tiles_m)),
        tiles_n(static_cast<int>(tiles_n)),
        steps(static_cast<int>(steps)),
        splits(static_cast<int>(splits)) {
    if (tiles_m * tiles_n * splits > INT32_MAX / 2) throw std::runtime_error("CUDA: more than 2^30 tiles");
  }
  struct Work {
    int m, n, split;
  };
  NEARFAR_DEVICE Work work(int index) const {
    const int tiles = tiles_m * tiles_n, tile = index % tiles, first = tile / (GROUP * tiles_n) * GROUP;
    const int left = tiles_m - first, group = left < GROUP ? left : GROUP, within = tile - first * tiles_n;
    return {first + within % group, within / group, index / tiles};
  }
  NEARFAR_DEVICE int begin(int split) const { return static_cast<int>(int64_t(steps) * split / splits); }
  NEARFAR_HOST_DEVICE int end() const { return tiles_m * tiles_n * splits; }
};

/// As many blocks as fit; each takes every so many'th tile, and while it is in the epilogue of one the first steps of
/// the next are on their way.
template <class A, class B, class Epilogue>
struct WgmmaKernel {
  using P = std::conditional_t<std::is_same_v<typename A::Element, float>, WgmmaSplit, Wgmma<typename A::Element>>;
  static constexpr int kThreads = cuda::kThreads, kResident = P::kResident;
  static constexpr bool kStores = P::template stores<Epilogue>();
  static constexpr int kStages = kStores ? 2 : 3;
  static constexpr int kMemory = kStages * P::kStage + (kStores ? 2 * P::kOperand : 0);
  A a;
  B b;
  TileOrder<16> order;
  Epilogue epilogue;

  NEARFAR_DEVICE int wanted(int index) const {
    for (; index < order.end(); index += static_cast<int>(cuda::block_count())) {
      const auto w = order.work(index);
      if (epilogue.wants(int64_t(w.m) * P::kM, int64_t(w.n) * P::kN, P::kM, P::kN)) break;
    }
    return index;
  }
  NEARFAR_DEVICE int next(int index) const { return wanted(index + static_cast<int>(cuda::block_count())); }

  /// The steps that a block loads, in order.
  struct Ahead {
    int index, m, n, step, left;
  };
  NEARFAR_DEVICE Ahead ahead_from(int index) const {
    const auto w = order.work(index);
    return {index, w.m, w.n, order.begin(w.split), order.begin(w.split + 1) - order.begin(w.split)};
  }
  NEARFAR_DEVICE void load(char* memory, uint64_t* full, int s, Ahead& ahead) const {
    if (ahead.index >= order.end()) return;
    cuda::barrier_expect(full + s, P::kStage);
    P::load(memory + s * P::kStage, a, ahead.m, ahead.step, full + s);
    P::load(memory + s * P::kStage + P::kOperand, b, ahead.n, ahead.step, full + s);
    ++ahead.step;
    if (--ahead.left == 0) ahead = ahead_from(next(ahead.index));
  }

  NEARFAR_DEVICE void operator()(char* memory) const {
    NEARFAR_SHARED uint64_t full[kStages], empty[kStages];
    NEARFAR_SHARED Ahead ahead;
    const bool leader = cuda::thread_index() == 0, speaker = cuda::thread_index() % 128 == 0;
    if (leader) {
      for (int s = 0; s < kStages; ++s) cuda::barrier_init(full + s, 1), cuda::barrier_init(empty + s, 2);
      cuda::barrier_fence();
      ahead = ahead_from(wanted(static_cast<int>(cuda::block_index())));
    }
    cuda::sync_block();
    if (leader)
      for (int s = 0; s < kStages; ++s) load(memory, full, s, ahead);
    int stage = 0, parity = 0;
    for (int index = wanted(static_cast<int>(cuda::block_index())); index < order.end(); index = next(index)) {
      typename P::Accumulators acc;
      NEARFAR_UNROLL
      for (int n = 0; n < 16; ++n) NEARFAR_UNROLL
      for (int q = 0; q < 4; ++q) acc.v[n][q] = 0;
      // A step's memory is free when it is done, and by then the one after it has been given to the tensor cores.
      int before = stage, before_parity = parity;
      const auto release = [&](int s) {
        if (speaker) cuda::barrier_arrive(empty + s);
      };
      const auto load_again = [&] {
        if (leader) {
          cuda::barrier_wait(empty + before, before_parity);
          load(memory, full, before, ahead);
        }
        cuda::sync_warp();
      };
      const auto own = order.work(index);
      const int count = order.begin(own.split + 1) - order.begin(own.split),
                below = a.first + own.m - (b.first + own.n);
      for (int k = 0; k < count; ++k) {
        cuda::barrier_wait(full + stage, parity);
        P::template step<A, B>(memory + stage * P::kStage, acc, below);
        if (P::kWaits) release(stage);
        if (k > 0) {
          if (!P::kWaits) {
            cuda::wgmma_wait<1>();
            release(before);
          }
          load_again();
        }
        before = stage, before_parity = parity;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      if (!P::kWaits) {
        cuda::wgmma_wait<0>();
        cuda::wgmma_fence(acc.v);
        release(before);
      }
      load_again();
      const auto w = order.work(index);
      epilogue.template apply<P>(
          Fragment<P>{acc, int64_t(w.m) * P::kM, int64_t(w.n) * P::kN, memory + kStages * P::kStage}, w.m, w.n,
          w.split);
    }
    if (leader) cuda::bulk_stored<false>();
  }
};

/// Every accumulator becomes value(of_rows[its row], of_columns[its column], accumulator, a, b); pointers are to the
/// numbers of the tile.
template <class P, class Value>
NEARFAR_DEVICE void for_each_pair(const Fragment<P>& f, const float* of_rows, const float* of_columns, Value value) {
  const int lane = cuda::opaque(cuda::lane_index());
  const float *rows = of_rows + cuda::warp_index() * 16 + lane / 4, *columns = of_columns + lane % 4 * 2;
  const float x[2] = {rows[0], rows[8]};
  NEARFAR_UNROLL
  for (int b = 0; b < P::kCols; b += 2) {
    const float2 y = cuda::load_pair(columns + b / 2 * 8);
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      f(a, b) = value(x[a], y.x, f(a, b), a, b);
      f(a, b + 1) = value(x[a], y.y, f(a, b + 1), a, b + 1);
    }
  }
}

/// The same of two numbers of each: value(of_rows, of_columns, others of both, accumulator).
template <class P, class Value>
NEARFAR_DEVICE void for_each_pair(const Fragment<P>& f, const float* of_rows, const float* of_columns,
                                  const float* rows_too, const float* columns_too, Value value) {
  const int lane = cuda::opaque(cuda::lane_index()), row = cuda::warp_index() * 16 + lane / 4, column = lane % 4 * 2;
  NEARFAR_UNROLL
  for (int a = 0; a < P::kRows; ++a) {
    const float x = of_rows[row + 8 * a], x_too = rows_too[row + 8 * a];
    NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; b += 2) {
      const float2 y = cuda::load_pair(of_columns + column + b / 2 * 8);
      const float2 y_too = cuda::load_pair(columns_too + column + b / 2 * 8);
      f(a, b) = value(x, y.x, x_too, y_too.x, f(a, b));
      f(a, b + 1) = value(x, y.y, x_too, y_too.y, f(a, b + 1));
    }
  }
}

/// Bits of a thread's columns, for each of its rows: does the pair (row, column of the tile) not count? whole: all do.
/// The loop is not unrolled, because its addresses would take the accumulators' registers.
template <class Has>
NEARFAR_DEVICE void hide_pairs(bool whole, Has has, uint32_t (&hidden)[WgmmaTile::kRows]) {
  NEARFAR_UNROLL
  for (int a = 0; a < WgmmaTile::kRows; ++a) {
    hidden[a] = 0;
    if (whole) continue;
    NEARFAR_ROLLED
    for (int b = 0; b < WgmmaTile::kCols; ++b) hidden[a] |= uint32_t(!has(WgmmaTile::row(a), WgmmaTile::col(b))) << b;
  }
}

/// Halves N values a lane over lanes that differ in `mask`: each keeps the sums of its half, the upper lane the upper.
template <int N>
NEARFAR_DEVICE void fold(float* v, int mask) {
  const bool upper = cuda::lane_index() & mask;
  NEARFAR_UNROLL
  for (int k = 0; k < N / 2; ++k) {
    const float send = upper ? v[k] : v[k + N / 2], keep = upper ? v[k + N / 2] : v[k];
    v[k] = keep + cuda::shuffle_xor(send, mask);
  }
}

/// Sums of every row and, with `columns`, of every column of the tile; place_row(i, sum), place_column(j, sum), once
/// each.
template <class P, class PlaceRow, class PlaceColumn>
NEARFAR_DEVICE void sum_lines(const Fragment<P>& f, bool columns, PlaceRow place_row, PlaceColumn place_column) {
  const int lane = cuda::lane_index();
  NEARFAR_UNROLL
  for (int a = 0; a < P::kRows; ++a) {
    float sum = 0;
    NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b) sum += f(a, b);
    // Not sum_of_row and first_of_row, which find the lane again: sixty bytes of registers spill.
    sum += cuda::shuffle_xor(sum, 1);
    sum += cuda::shuffle_xor(sum, 2);
    if (lane % P::kRowLanes == 0) place_row(P::row(a), sum);
  }
  if (!columns) return;
  float v[P::kCols];
  NEARFAR_UNROLL
  for (int b = 0; b < P::kCols; ++b) v[b] = f(0, b) + f(1, b);
  fold<32>(v, 16);
  fold<16>(v, 8);
  fold<8>(v, 4);
  NEARFAR_SHARED float parts[cuda::kWarps][P::kN];
  cuda::sync_block();
  NEARFAR_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int b = (lane & 16) + (lane & 8) + (lane & 4) + k;  // halves of 32, 16, 8
    parts[cuda::warp_index()][P::col(b)] = v[k];
  }
  cuda::sync_block();
  const int j = cuda::thread_index();
  if (j >= P::kN) return;
  float sum = 0;
  NEARFAR_UNROLL
  for (int w = 0; w < cuda::kWarps; ++w) sum += parts[w][j];
  place_column(j, sum);
}

/// The tile to a blocked matrix, tile (down, right) of it, through shared memory, rounded to what the rows are.
template <class P>
NEARFAR_DEVICE void store_blocked(const Fragment<P>& f, const Blocked& to, int64_t down, int64_t right) {
  if (cuda::thread_index() == 0) cuda::bulk_stored<true>();
  cuda::sync_block();
  // Rows 8 apart keep their low bits, and so the order of the pieces of 16 bytes.
  const int lane = cuda::opaque(cuda::lane_index());
  const uint32_t line = cuda::shared_address(f.memory) + (cuda::warp_index() * 16 + lane / 4) * 128 + lane % 4 * 4;
  NEARFAR_UNROLL
  for (int b = 0; b < P::kCols; b += 2) {
    const int piece = b / 2;
    const uint32_t at = line + piece / 8 * P::kOperand + (piece % 8 ^ lane / 4) * 16;
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) cuda::store_pair<typename P::Element>(at + a * 8 * 128, f(a, b), f(a, b + 1));
  }
  cuda::fence_async();
  cuda::sync_block();
  if (cuda::thread_index() == 0) cuda::bulk_store(to.block(down, 2 * right), f.memory, 2 * P::kOperand);
}

/// steps: of a block's columns along the sum.
template <class A, class B, class Epilogue>
void launch_wgmma(cuda::Context& c, const A& a, const B& b, int64_t tiles_m, int64_t tiles_n, int64_t steps,
                  int64_t splits, const Epilogue& epilogue) {
  using Kernel = WgmmaKernel<A, B, Epilogue>;
  const TileOrder<16> order(tiles_m, tiles_n, steps, splits);
  const int64_t work = order.end(), fit = Kernel::kResident * c.device.multiprocessors;
  c.launch_large(work < fit ? work : fit, Kernel::kMemory, Kernel{a, b, order, epilogue});
}

}  // namespace device
}  // namespace nearfar
