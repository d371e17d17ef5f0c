// Multiply on Hopper's tensor cores: blocks (blocked.hpp) through the copy engine, float32 accumulators.
//
// C[i][j] = sum_k A[i][k] B[j][k] as in tile.hpp, with the same epilogues. Tiles of 128 x 128, two warpgroups of 64
// rows. Here: what tiles and operands are, and the kernel of float32 rows in two pieces of tf32. That of 16-bit rows is
// in wgmma_wide.hpp.
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
  static constexpr int kApart = 1;     // rows from one lane's to the next's
  static constexpr int kSpeakers = 2;  // threads that give a stage back
  struct Accumulators {
    float v[16][4];
  };
  NEARFAR_DEVICE static int warp_m() { return cuda::warp_index(); }
  NEARFAR_DEVICE static int warp_n() { return 0; }
  NEARFAR_DEVICE static int row(int a) { return cuda::warp_index() * 16 + a * 8 + cuda::lane_index() / 4; }
  NEARFAR_DEVICE static int col(int b) { return b / 2 * 8 + b % 2 + cuda::lane_index() % 4 * 2; }
  NEARFAR_DEVICE static float& value(Accumulators& acc, int a, int b) { return acc.v[b / 2][a * 2 + b % 2]; }
  NEARFAR_DEVICE static void clear(Accumulators& acc) {
    NEARFAR_UNROLL
    for (int n = 0; n < 16; ++n) NEARFAR_UNROLL
    for (int q = 0; q < 4; ++q) acc.v[n][q] = 0;
  }
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

/// The tile of bfloat16 or float16 rows that an epilogue sees.
template <class E>
struct Wgmma : WgmmaTile {
  using Element = E;
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
  /// A tile of a part of the depth.
  struct Work {
    int m, n, split, steps;
  };
  /// Where the depth is not cut, and rows of tiles come in whole groups, it takes one division.
  NEARFAR_DEVICE Work work(int index) const {
    Work w{0, 0, 0, steps};
    if (splits > 1) {
      w.split = index / (tiles_m * tiles_n), index %= tiles_m * tiles_n;
      w.steps = begin(w.split + 1) - begin(w.split);
    }
    const int first = index / (GROUP * tiles_n) * GROUP, within = index - first * tiles_n, left = tiles_m - first;
    w.n = left < GROUP ? within / left : within / GROUP;
    w.m = first + within - w.n * (left < GROUP ? left : GROUP);
    return w;
  }
  NEARFAR_DEVICE int begin(int split) const {
    return splits > 1 ? static_cast<int>(int64_t(steps) * split / splits) : 0;
  }
  NEARFAR_HOST_DEVICE int end() const { return tiles_m * tiles_n * splits; }
};

/// A stage of a ring; `parity` changes every round.
template <int STAGES>
struct RingPlace {
  int stage = 0, parity = 0;
  NEARFAR_DEVICE void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

/// Shared memory of a warp for what it stores: 8 lines of 128 bytes.
constexpr int kWarpPiece = 1024;

/// A block a multiprocessor; each takes every so many'th tile, and while it is in the epilogue of one the first steps
/// of the next are on their way: one thread keeps copies in flight.
template <class A, class B, class Epilogue>
struct WgmmaKernel {
  using P = WgmmaSplit;
  static constexpr int kThreads = cuda::kThreads, kResident = 1;
  static constexpr int kStages = 3;
  static constexpr int kMemory = kStages * P::kStage;
  A a;
  B b;
  TileOrder<16> order;
  Epilogue epilogue;

  using Work = typename TileOrder<16>::Work;
  NEARFAR_DEVICE int wanted(int index) const {
    for (; index < order.end(); index += static_cast<int>(cuda::block_count())) {
      const auto w = order.work(index);
      if (epilogue.wants(int64_t(w.m) * P::kM, int64_t(w.n) * P::kN, P::kM, P::kN)) break;
    }
    return index;
  }
  NEARFAR_DEVICE int next(int index) const { return wanted(index + static_cast<int>(cuda::block_count())); }

  /// The steps that a block loads, in order; and what tiles they are of, for all who have waited for the first step of
  /// one. No more than kStages are under way beside the one in the epilogue.
  struct Ahead {
    static constexpr int kMost = 8;
    Work of[kMost];
    int index, tile, step, left;
  };
  NEARFAR_DEVICE void look_ahead(Ahead& ahead, int tile, int index) const {
    const Work w = order.work(index);
    ahead.of[tile % Ahead::kMost] = w;
    ahead.index = index, ahead.tile = tile, ahead.step = 0, ahead.left = w.steps;
  }
  NEARFAR_DEVICE void load(char* memory, uint64_t* full, int s, Ahead& ahead) const {
    if (ahead.index >= order.end()) return;
    const Work& w = ahead.of[ahead.tile % Ahead::kMost];
    cuda::barrier_expect(full + s, P::kStage);
    P::load(memory + s * P::kStage, a, w.m, ahead.step, full + s);
    P::load(memory + s * P::kStage + P::kOperand, b, w.n, ahead.step, full + s);
    ++ahead.step;
    if (--ahead.left == 0) look_ahead(ahead, ahead.tile + 1, next(ahead.index));
  }

  NEARFAR_DEVICE void operator()(char* memory) const {
    NEARFAR_SHARED uint64_t full[kStages], empty[kStages];
    NEARFAR_SHARED Ahead ahead;
    const bool leader = cuda::thread_index() == 0, speaker = cuda::thread_index() % 128 == 0;
    if (leader) {
      for (int s = 0; s < kStages; ++s) cuda::barrier_init(full + s, 1), cuda::barrier_init(empty + s, 2);
      cuda::barrier_fence();
      look_ahead(ahead, 0, wanted(static_cast<int>(cuda::block_index())));
    }
    cuda::sync_block();
    if (leader) {
      NEARFAR_ROLLED
      for (int s = 0; s < kStages; ++s) load(memory, full, s, ahead);
    }
    int stage = 0, parity = 0, tile = 0;
    for (int index = wanted(static_cast<int>(cuda::block_index())); index < order.end(); index = next(index)) {
      typename P::Accumulators acc;
      P::clear(acc);
      // A step's memory is loaded again after the next step, so that nobody waits for the other warpgroup.
      int before = stage, before_parity = parity;
      const auto load_again = [&] {
        if (leader) {
          cuda::barrier_wait(empty + before, before_parity);
          load(memory, full, before, ahead);
        }
        cuda::sync_warp();
      };
      cuda::barrier_wait(full + stage, parity);
      const Work& own = ahead.of[tile++ % Ahead::kMost];
      const int count = own.steps, below = a.first + own.m - (b.first + own.n);
      for (int k = 0; k < count; ++k) {
        if (k > 0) cuda::barrier_wait(full + stage, parity);
        P::template step<A, B>(memory + stage * P::kStage, acc, below);
        if (speaker) cuda::barrier_arrive(empty + stage);
        if (k > 0) load_again();
        before = stage, before_parity = parity;
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      load_again();
      const Work w = own;
      epilogue.template apply<P>(Fragment<P>{acc, int64_t(w.m) * P::kM, int64_t(w.n) * P::kN}, w.m, w.n, w.split);
    }
  }
};

/// Every accumulator becomes value(x, y, accumulator, a, b), where x are the R numbers of its row and y the C numbers
/// of its column; pointers are to the numbers of the tile. done(half) follows every half of the columns.
template <class P, int R, int C, class Value, class Done>
NEARFAR_DEVICE void for_each_pair(const Fragment<P>& f, const float* const (&of_rows)[R],
                                  const float* const (&of_columns)[C], Value value, Done done) {
  // What depends on the thread only is found anew: it would wait for the next tile in registers.
  const int thread = cuda::opaque(cuda::thread_index()), row = thread / 32 * 16 + thread % 32 / 4,
            column = thread % 4 * 2;
  constexpr int kAhead = C < 4 ? 2 : 1;  // loads that are under way, as far as there are registers
  float x[P::kRows][R];
  float2 next[kAhead][C];
  const float* columns[C];
  NEARFAR_UNROLL
  for (int c = 0; c < C; ++c) columns[c] = of_columns[c] + column;
  const auto load = [&](int k) {
    NEARFAR_UNROLL
    for (int c = 0; c < C; ++c) next[k % kAhead][c] = cuda::load_pair(columns[c] + k * 8);
  };
  NEARFAR_UNROLL
  for (int k = 0; k < kAhead; ++k) load(k);
  NEARFAR_UNROLL
  for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
  for (int r = 0; r < R; ++r) x[a][r] = of_rows[r][row + 8 * a];
  NEARFAR_UNROLL
  for (int k = 0; k < P::kCols / 2; ++k) {
    float y[2][C];
    NEARFAR_UNROLL
    for (int c = 0; c < C; ++c) y[0][c] = next[k % kAhead][c].x, y[1][c] = next[k % kAhead][c].y;
    if (k + kAhead < P::kCols / 2) load(k + kAhead);
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int q = 0; q < 2; ++q) f(a, 2 * k + q) = value(x[a], y[q], f(a, 2 * k + q), a, 2 * k + q);
    if (k % 8 == 7) done(k / 8);
  }
}
template <class P, int R, int C, class Value>
NEARFAR_DEVICE void for_each_pair(const Fragment<P>& f, const float* const (&of_rows)[R],
                                  const float* const (&of_columns)[C], Value value) {
  for_each_pair(f, of_rows, of_columns, value, [](int) {});
}

/// Bits of a thread's columns, for each of its rows: does the pair (row, column of the tile) not count? The loop is not
/// unrolled, because its addresses would take the accumulators' registers.
template <class Has>
NEARFAR_DEVICE void hide_pairs(Has has, uint32_t (&hidden)[WgmmaTile::kRows]) {
  NEARFAR_UNROLL
  for (int a = 0; a < WgmmaTile::kRows; ++a) {
    hidden[a] = 0;
    NEARFAR_ROLLED
    for (int b = 0; b < WgmmaTile::kCols; ++b) hidden[a] |= uint32_t(!has(WgmmaTile::row(a), WgmmaTile::col(b))) << b;
  }
}
/// body(hides), where hides(a, b) says that a pair does not count. In the code twice, so that where the whole tile
/// counts nobody asks.
template <class Has, class Body>
NEARFAR_DEVICE void with_hidden(bool whole, Has has, Body body) {
  if (whole) return body([](int, int) { return false; });
  uint32_t hidden[WgmmaTile::kRows];
  hide_pairs(has, hidden);
  body([&](int a, int b) -> bool { return hidden[a] >> b & 1; });
}

/// Halves N values a lane over lanes that differ in `mask`: each keeps the sums of its half, the upper lane the upper.
template <int N>
NEARFAR_DEVICE void fold(float* v, int lane, int mask) {
  const bool upper = lane & mask;
  NEARFAR_UNROLL
  for (int k = 0; k < N / 2; ++k) {
    const float send = upper ? v[k] : v[k + N / 2], keep = upper ? v[k + N / 2] : v[k];
    v[k] = keep + cuda::shuffle_xor(send, mask);
  }
}

/// Totals of rows from a thread's part of each; place(i, total) once for every row of the tile.
template <class P, class Place>
NEARFAR_DEVICE void place_rows(const float (&sums)[P::kRows], Place place) {
  const int thread = cuda::opaque(cuda::thread_index());
  NEARFAR_UNROLL
  for (int a = 0; a < P::kRows; ++a) {
    const float total = sum_of_row<P>(sums[a]);
    if (thread % P::kRowLanes == 0) place(thread / cuda::kWarp * 16 + a * 8 + thread % cuda::kWarp / 4, total);
  }
}

/// Sums of every column of the tile, or of one of PARTS of them; place(j, sum), once each.
template <int PARTS = 1, class P, class Place>
NEARFAR_DEVICE void sum_columns(const Fragment<P>& f, Place place, int part = 0) {
  constexpr int kCols = P::kCols / PARTS;  // of a thread
  const int thread = cuda::opaque(cuda::thread_index()), lane = thread % cuda::kWarp, first = part * kCols;
  float v[kCols];
  NEARFAR_UNROLL
  for (int b = 0; b < kCols; ++b) v[b] = f(0, first + b) + f(1, first + b);
  fold<kCols>(v, lane, 16);
  fold<kCols / 2>(v, lane, 8);
  fold<kCols / 4>(v, lane, 4);
  NEARFAR_SHARED float parts[cuda::kWarps][P::kN];
  cuda::sync_block();
  NEARFAR_UNROLL
  for (int k = 0; k < kCols / 8; ++k) {
    const int b = first + (lane & 28) * kCols / 32 + k;  // halves of halves of halves
    parts[thread / cuda::kWarp][b / 2 * 8 + b % 2 + lane % 4 * 2] = v[k];
  }
  cuda::sync_block();
  if (thread >= P::kN / PARTS) return;
  const int j = part * (P::kN / PARTS) + thread;
  float sum = 0;
  NEARFAR_UNROLL
  for (int w = 0; w < cuda::kWarps; ++w) sum += parts[w][j];
  place(j, sum);
}

/// Half of the columns of the tile to a blocked matrix, tile (down, right) of it, rounded to what the rows are. Every
/// warp for itself: eight rows of it are whole lines of a block, which lie together.
template <class P>
NEARFAR_DEVICE void store_half(const Fragment<P>& f, const Blocked& to, int64_t down, int64_t right, int half) {
  using E = typename P::Element;
  const int thread = cuda::opaque(cuda::thread_index()), lane = thread % cuda::kWarp, warp = thread / cuda::kWarp;
  const uint32_t own = cuda::shared_address(f.memory) + warp * kWarpPiece;
  const uint32_t line = own + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16;
  char* out = reinterpret_cast<char*>(to.block(down, 2 * right + half)) + warp * 2048;
  NEARFAR_UNROLL
  for (int a = 0; a < P::kRows; ++a) {
    cuda::sync_warp();
    NEARFAR_UNROLL
    for (int piece = 0; piece < 8; piece += 4) {
      uint32_t bits[4];
      NEARFAR_UNROLL
      for (int q = 0; q < 4; ++q) {
        const int b = 2 * (8 * half + piece + q);
        bits[q] = cuda::pack_pair<E>(f(a, b), f(a, b + 1));
      }
      cuda::store_matrices(line ^ piece * 16, bits);
    }
    cuda::sync_warp();
    NEARFAR_UNROLL
    for (int k = 0; k < 2; ++k) cuda::copy_piece(out + (2 * a + k) * 512 + lane * 16, own + k * 512 + lane * 16);
  }
}

/// steps: of a block's columns along the sum.
template <class A, class B, class Epilogue>
void launch_wgmma(cuda::Context& c, const A& a, const B& b, int64_t tiles_m, int64_t tiles_n, int64_t steps,
                  const Epilogue& epilogue) {
  using Kernel = WgmmaKernel<A, B, Epilogue>;
  const TileOrder<16> order(tiles_m, tiles_n, steps, 1);
  const int64_t work = order.end(), fit = c.device.multiprocessors;
  c.launch_large(work < fit ? work : fit, Kernel::kMemory, Kernel{a, b, order, epilogue});
}

}  // namespace device
}  // namespace nearfar
