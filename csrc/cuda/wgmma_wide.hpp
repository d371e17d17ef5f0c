// Products of blocked 16-bit rows on Hopper's tensor cores: wgmma.hpp in tiles of 128 x 256 or 256 x 128, which read
// three quarters of what two tiles of 128 x 128 read. Such a tile leaves room for one block a multiprocessor; a thread
// of a warpgroup of its own, which leaves its registers to the others, keeps copies in flight, also while these are in
// an epilogue.
#pragma once

#include "cuda/wgmma.hpp"

namespace nearfar {
inline namespace device {

/// The stages of a block, as a warpgroup goes through them. SPEAKERS threads give one back.
template <int STAGES, int BYTES, int SPEAKERS>
struct Ring : RingPlace<STAGES> {
  char* memory;
  uint64_t *full, *empty, *turn;
  int turns = 0;

  NEARFAR_DEVICE char* at() const { return memory + this->stage * BYTES; }
  NEARFAR_DEVICE const char* wait_full() const {
    cuda::barrier_wait(full + this->stage, this->parity);
    return at();
  }
  NEARFAR_DEVICE void wait_empty() const { cuda::barrier_wait(empty + this->stage, this->parity ^ 1); }
  NEARFAR_DEVICE void free(int which) const {
    if (cuda::thread_index() % (cuda::kThreads / SPEAKERS) == 0) cuda::barrier_arrive(empty + which);
  }
  /// Two warpgroups give products to the tensor cores by turns: while one's are done, the other makes its next.
  NEARFAR_DEVICE void take_turn() const {
    const int group = cuda::warp_index() / 4;
    cuda::barrier_wait(turn + group, (turns & 1) ^ (group == 0));
  }
  NEARFAR_DEVICE void pass_turn() {
    if (cuda::thread_index() % 128 == 0) cuda::barrier_arrive(turn + 1 - cuda::warp_index() / 4);
    turns ^= 1;
  }
};

/// The sum of a tile by products that are given one step after the other: the memory of one is free when it is done,
/// and by then the one after it has been given to the tensor cores.
template <class P, class A, class B, class Ring>
NEARFAR_DEVICE void sum_steps(int steps, Ring& ring, typename P::Accumulators& acc) {
  int before = ring.stage;
  for (int k = 0; k < steps; ++k, ring.next()) {
    P::template step<A, B>(ring.wait_full(), acc);
    if (k > 0) {
      cuda::wgmma_wait<1>();
      ring.free(before);
    }
    before = ring.stage;
  }
  cuda::wgmma_wait<0>();
  P::fence(acc);
  ring.free(before);
}

/// Of products with weights, whose lines are sent to memory by `put_rows`.
struct WgmmaProduct : WgmmaTile {
  // What a warp sends in one go: eight rows of 128 float32, apart by a quarter of the banks.
  static constexpr int kPitch = 128 + 8, kStaged = 8 * kPitch - 8;
  static constexpr int kForEpilogue = cuda::kWarps * kStaged * static_cast<int>(sizeof(float)), kGroup = 4;
};
template <class P>
constexpr bool is_product = std::is_base_of_v<WgmmaProduct, P>;

/// Weights times rows. Two warpgroups: each takes 64 of every 128 rows. A: as in WgmmaTile. B: rows, to be summed over.
template <class E, int M, int N>
struct WgmmaWide : WgmmaProduct {
  using Element = E;
  static constexpr int kM = M, kN = N, kRows = M / 64, kCols = N / 4;
  static constexpr int kBlock = Blocked::kBytes, kTiles = M / 128, kPieces = N / 64;  // of A, of B
  static constexpr int kFirst = kTiles * kBlock, kStage = kFirst + kPieces * kHalf;
  struct Accumulators {
    float v[kTiles][N / 8][4];
  };
  NEARFAR_DEVICE static int row(int a) { return WgmmaTile::row(a % 2) + a / 2 * 128; }
  NEARFAR_DEVICE static float& value(Accumulators& acc, int a, int b) { return acc.v[a / 2][b / 2][a % 2 * 2 + b % 2]; }

  template <class A, class B>
  NEARFAR_DEVICE static void step(const char* stage, Accumulators& acc) {
    const int group = cuda::warp_index() / 4;
    cuda::wgmma_begin();
    NEARFAR_UNROLL
    for (int k = 0; k < 4; ++k) NEARFAR_UNROLL
    for (int tile = 0; tile < kTiles; ++tile)
      cuda::wgmma<E, !A::kSumColumns, true>(acc.v[tile], view<A>(stage + tile * kBlock, group, k),
                                            view<B>(stage + kFirst, 0, k));
    cuda::wgmma_commit();
  }
  NEARFAR_DEVICE static void clear(Accumulators& acc) {
    NEARFAR_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) NEARFAR_UNROLL
    for (int n = 0; n < N / 8; ++n) NEARFAR_UNROLL
    for (int q = 0; q < 4; ++q) acc.v[tile][n][q] = 0;
  }
  NEARFAR_DEVICE static void fence(Accumulators& acc) {
    NEARFAR_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) cuda::wgmma_fence(acc.v[tile]);
  }
  template <class A, class B, class Ring>
  NEARFAR_DEVICE static void sum(const A&, int, int, int steps, Ring& ring, Accumulators& acc) {
    sum_steps<WgmmaWide, A, B>(steps, ring, acc);
  }
  template <class Epilogue>
  NEARFAR_DEVICE static void apply(const Epilogue& epilogue, Accumulators& acc, int m, int n, int split, int,
                                   char* memory) {
    epilogue.template apply<WgmmaWide>(Fragment<WgmmaWide>{acc, int64_t(m) * M, int64_t(n) * N, memory}, m, n, split);
  }
  /// Step k of tile m of A, which has `lines` tiles of 128, and of tile n of B. What would lie outside is left out, and
  /// so its sums are anything.
  template <class A, class B>
  NEARFAR_DEVICE static void load(char* stage, const A& a, int m, int lines, const B& b, int n, int k,
                                  uint64_t* barrier) {
    static_assert(!B::kSumColumns, "a step is half of each of B's blocks");
    const int left_a = lines - m * kTiles, left_b = static_cast<int>(b.blocks.across) - n * kPieces;
    const int tiles = left_a < kTiles ? left_a : kTiles, pieces = left_b < kPieces ? left_b : kPieces;
    cuda::barrier_expect(barrier, tiles * kBlock + pieces * kHalf);
    for (int tile = 0; tile < tiles; ++tile) WgmmaTile::load(stage + tile * kBlock, a, m * kTiles + tile, k, barrier);
    const char* from = reinterpret_cast<const char*>(b.blocks.block(k / 2, n * kPieces)) + k % 2 * kHalf;
    for (int piece = 0; piece < pieces; ++piece)
      cuda::bulk_load(stage + kFirst + piece * kHalf, from + piece * kBlock, kHalf, barrier);
  }
};

/// Scores: rows times rows. To an epilogue the two halves of a tile are two tiles of Wgmma<E>.
template <class E>
struct WgmmaTwin : WgmmaTile {
  using Element = E;
  using Half = Wgmma<E>;
  static constexpr int kN = 256, kBlock = Blocked::kBytes, kStage = 3 * kBlock;
  static constexpr int kForEpilogue = cuda::kWarps * kWarpPiece, kGroup = 16;
  struct Accumulators {
    typename Half::Accumulators half[2];
  };
  NEARFAR_DEVICE static void clear(Accumulators& acc) {
    Half::clear(acc.half[0]);
    Half::clear(acc.half[1]);
  }
  NEARFAR_DEVICE static void fence(Accumulators& acc) {
    cuda::wgmma_fence(acc.half[0].v);
    cuda::wgmma_fence(acc.half[1].v);
  }
  template <class A, class B, class Ring>
  NEARFAR_DEVICE static void sum(const A&, int, int, int steps, Ring& ring, Accumulators& acc) {
    sum_steps<WgmmaTwin, A, B>(steps, ring, acc);
  }
  template <class A, class B>
  NEARFAR_DEVICE static void step(const char* stage, Accumulators& acc) {
    const int group = cuda::warp_index() / 4;
    cuda::wgmma_begin();
    NEARFAR_UNROLL
    for (int k = 0; k < 4; ++k)
      cuda::wgmma<E>(acc.half[0].v, acc.half[1].v, view<A>(stage, group, k), view<B>(stage + kBlock, 0, k));
    cuda::wgmma_commit();
  }
  /// Step k of tile m of A and n of B, which has `lines` tiles of 128.
  template <class A, class B>
  NEARFAR_DEVICE static void load(char* stage, const A& a, int m, int lines, const B& b, int n, int k,
                                  uint64_t* barrier) {
    static_assert(A::kSumColumns && B::kSumColumns, "both are summed along their rows");
    const int tiles = lines - 2 * n < 2 ? 1 : 2;
    cuda::barrier_expect(barrier, (1 + tiles) * kBlock);
    WgmmaTile::load(stage, a, m, k, barrier);
    for (int tile = 0; tile < tiles; ++tile) WgmmaTile::load(stage + (1 + tile) * kBlock, b, 2 * n + tile, k, barrier);
  }
  template <class Epilogue>
  NEARFAR_DEVICE static void apply(const Epilogue& epilogue, Accumulators& acc, int m, int n, int split, int lines,
                                   char* memory) {
    NEARFAR_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int own = 2 * n + half;
      const int64_t i0 = int64_t(m) * Half::kM, j0 = int64_t(own) * Half::kN;
      if (own < lines && epilogue.wants(i0, j0, Half::kM, Half::kN))
        epilogue.template apply<Half>(Fragment<Half>{acc.half[half], i0, j0, memory}, m, own, split);
    }
  }
};

/// out_ik = value, or with ADD += value * factor(i), of a tile of (rows, d). A launch adds once to every number, so
/// that it does not matter who adds first.
template <bool ADD, class P, class Factor>
NEARFAR_DEVICE void put_rows(const Fragment<P>& f, float* out, int64_t rows, int64_t d, Factor factor) {
  const int lane = cuda::opaque(cuda::lane_index());
  const auto multiplier = [&](int64_t i) { return ADD && i < rows ? factor(i) : 1.0f; };
  if (d % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    float* own = reinterpret_cast<float*>(f.memory) + cuda::warp_index() * P::kStaged;
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) {
      const float multiply = multiplier(f.i(a));
      const int64_t i = f.i(a) + (lane - lane / 4) * P::kApart;  // of the line that this lane sends
      NEARFAR_UNROLL
      for (int part = 0; part < P::kCols / 32; ++part) {
        cuda::bulk_stored<true>();
        cuda::sync_warp();
        NEARFAR_UNROLL
        for (int b = 0; b < 32; b += 2)
          *reinterpret_cast<float2*>(own + lane / 4 * P::kPitch + b * 4 + lane % 4 * 2) =
              make_float2(f(a, part * 32 + b) * multiply, f(a, part * 32 + b + 1) * multiply);
        cuda::fence_async();
        cuda::sync_warp();
        const int64_t k = f.j0 + part * 128;
        if (lane >= 8 || i >= rows || k >= d) continue;
        const int bytes = static_cast<int>((d - k < 128 ? d - k : 128) * sizeof(float));
        if (ADD) {
          cuda::bulk_add(out + i * d + k, own + lane * P::kPitch, bytes);
        } else {
          cuda::bulk_store(out + i * d + k, own + lane * P::kPitch, bytes);
        }
      }
    }
    return;
  }
  NEARFAR_UNROLL
  for (int a = 0; a < P::kRows; ++a) {
    const int64_t i = f.i(a);
    const float multiply = multiplier(i);
    const int64_t first = f.j0 + lane % 4 * 2, beside = d - first;
    const int left = i >= rows ? 0 : static_cast<int>(beside < P::kN ? beside : P::kN);
    float* at = out + i * d + first;
    NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b) {
      const int k = b / 2 * 8 + b % 2;
      if (k < left) at[k] = (ADD ? at[k] : 0.0f) + f(a, b) * multiply;
    }
  }
}

/// As many blocks as multiprocessors; each takes every so many'th tile. Two warpgroups multiply, the last one copies.
template <class P, class A, class B, class Epilogue>
struct WideKernel {
  using Order = TileOrder<P::kGroup>;
  static constexpr int kThreads = cuda::kThreads + 128, kResident = 1;  // 168 registers each: 2 x 240 + 24
  static constexpr int kStages = 4;
  using Stages = Ring<kStages, P::kStage, P::kSpeakers>;
  static constexpr int kMemory = kStages * P::kStage + P::kForEpilogue;
  A a;
  B b;
  int lines;  // tiles of 128 rows that there are: of A, or of scores of B
  Order order;
  Epilogue epilogue;

  /// f(tile) of those that a block takes.
  template <class F>
  NEARFAR_DEVICE void for_tiles(F f) const {
    for (int index = static_cast<int>(cuda::block_index()); index < order.end();
         index += static_cast<int>(cuda::block_count())) {
      const auto w = order.work(index);
      if (epilogue.wants(int64_t(w.m) * P::kM, int64_t(w.n) * P::kN, P::kM, P::kN)) f(w);
    }
  }

  NEARFAR_DEVICE void operator()(char* memory) const {
    NEARFAR_SHARED uint64_t full[kStages], empty[kStages], turn[2];
    const Stages ring{{}, memory, full, empty, turn};
    if (cuda::thread_index() == 0) {
      for (int group = 0; group < 2; ++group) cuda::barrier_init(turn + group, 1);
      for (int s = 0; s < kStages; ++s) cuda::barrier_init(full + s, 1), cuda::barrier_init(empty + s, P::kSpeakers);
      cuda::barrier_fence();
    }
    cuda::sync_all();
    if (cuda::thread_index() < cuda::kThreads) {
      cuda::take_registers<240>();
      multiply(ring);
    } else {
      cuda::give_registers<24>();
      if (cuda::thread_index() == cuda::kThreads) copy(ring);
    }
  }

  NEARFAR_DEVICE void copy(Stages ring) const {
    for_tiles([&](const auto& w) {
      const int first = order.begin(w.split);
      for (int k = first; k < first + w.steps; ++k, ring.next()) {
        ring.wait_empty();
        P::load(ring.at(), a, w.m, lines, b, w.n, k, ring.full + ring.stage);
      }
    });
  }

  NEARFAR_DEVICE void multiply(Stages ring) const {
    for_tiles([&](const auto& w) {
      typename P::Accumulators acc;
      P::clear(acc);
      P::template sum<A, B>(a, w.m, order.begin(w.split), w.steps, ring, acc);
      P::apply(epilogue, acc, w.m, w.n, w.split, lines, ring.memory + kStages * P::kStage);
    });
    cuda::bulk_stored<false>();
  }
};

template <class P, class A, class B, class Epilogue>
void launch_wide(cuda::Context& c, const A& a, const B& b, int64_t lines, int64_t tiles_m, int64_t tiles_n,
                 int64_t steps, int64_t splits, const Epilogue& epilogue) {
  using Kernel = WideKernel<P, A, B, Epilogue>;
  const typename Kernel::Order order(tiles_m, tiles_n, steps, splits);
  const int64_t work = order.end(), fit = c.device.multiprocessors;
  c.launch_large(work < fit ? work : fit, Kernel::kMemory, Kernel{a, b, static_cast<int>(lines), order, epilogue});
}

/// Of weights and rows. lines, pieces: blocks of 128 rows of A and of 64 columns of B. Every part of the depth has a
/// step at least.
template <class P, class A, class B, class Epilogue>
void launch_product(cuda::Context& c, const A& a, const B& b, int64_t lines, int64_t pieces, int64_t steps,
                    int64_t splits, const Epilogue& epilogue) {
  launch_wide<P>(c, a, b, lines, ceil_div(lines, P::kTiles), ceil_div(pieces, P::kPieces), steps, splits, epilogue);
}

}  // namespace device
}  // namespace nearfar
