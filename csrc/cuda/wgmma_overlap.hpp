// Scores of blocked 16-bit rows on Hopper's tensor cores, which multiply during epilogues: while threads are in the
// epilogue of a tile of 128 x 128, the products of their next tile are in flight, in other accumulators.
//
// Products in flight hold their operands, and nobody in an epilogue can say that a step is done with them. So there is
// room for whole depths: 128 rows of x, which stay, and twice 128 rows of y, of which some are copied while others are
// multiplied. A block takes a run of tiles along rows of tiles, and seldom another 128 rows of x.
#pragma once

#include "cuda/wgmma.hpp"

namespace nearfar {
inline namespace device {

constexpr int kOverlapSteps = 4;  // of the depth: for more there is no room
constexpr int64_t kOverlapDepth = kOverlapSteps * Blocked::kColumns;

/// A block a multiprocessor. Two warpgroups multiply, one thread of the last one copies, as in WideKernel.
template <class E, class Epilogue>
struct OverlapKernel {
  using P = Wgmma<E>;
  using Rows = BlockedOperand<true, E>;
  using Accumulators = typename P::Accumulators;
  static constexpr int kThreads = cuda::kThreads + 128, kResident = 1;  // 168 registers each: 2 x 240 + 24
  static constexpr int kStages = 2, kStage = kOverlapSteps * Blocked::kBytes;
  static constexpr int kOfX = kStages * kStage, kForEpilogue = kOfX + kStage;  // where they begin
  static constexpr int kMemory = kForEpilogue + cuda::kWarps * kWarpPiece;
  Rows x, y;
  int tiles_m, tiles_n, steps;
  Epilogue epilogue;

  struct Barriers {
    uint64_t full[kStages], empty[kStages], x_full, x_empty;
  };

  /// `left`: tiles of the run from this one on, or none.
  struct Tile {
    int m, n, left;
  };
  NEARFAR_DEVICE Tile first() const {
    const int64_t tiles = int64_t(tiles_m) * tiles_n, block = cuda::block_index(), blocks = cuda::block_count();
    const int begin = static_cast<int>(tiles * block / blocks), end = static_cast<int>(tiles * (block + 1) / blocks);
    return wanted({begin / tiles_n, begin % tiles_n, end - begin});
  }
  NEARFAR_DEVICE Tile after(const Tile& tile) const { return wanted(beside(tile)); }
  NEARFAR_DEVICE Tile beside(const Tile& tile) const {
    const bool last = tile.n + 1 == tiles_n;
    return {last ? tile.m + 1 : tile.m, last ? 0 : tile.n + 1, tile.left - 1};
  }
  NEARFAR_DEVICE Tile wanted(Tile tile) const {
    while (tile.left > 0 && !epilogue.wants(int64_t(tile.m) * P::kM, int64_t(tile.n) * P::kN, P::kM, P::kN))
      tile = beside(tile);
    return tile;
  }

  NEARFAR_DEVICE void operator()(char* memory) const {
    NEARFAR_SHARED Barriers barriers;
    if (cuda::thread_index() == 0) {
      for (int s = 0; s < kStages; ++s)
        cuda::barrier_init(barriers.full + s, 1), cuda::barrier_init(barriers.empty + s, 2);
      cuda::barrier_init(&barriers.x_full, 1), cuda::barrier_init(&barriers.x_empty, 2);
      cuda::barrier_fence();
    }
    cuda::sync_all();
    if (cuda::thread_index() < cuda::kThreads) {
      cuda::take_registers<240>();
      multiply(memory, barriers);
    } else {
      cuda::give_registers<24>();
      if (cuda::thread_index() == cuda::kThreads) copy(memory, barriers);
    }
  }

  NEARFAR_DEVICE void copy(char* memory, Barriers& barriers) const {
    const int bytes = steps * Blocked::kBytes;  // blocks of a row of blocks lie together
    const auto load = [&](char* to, const Rows& rows, int tile, uint64_t* full, uint64_t* empty, int parity) {
      cuda::barrier_wait(empty, parity ^ 1);
      cuda::barrier_expect(full, bytes);
      cuda::bulk_load(to, rows.blocks.block(tile, 0), bytes, full);
    };
    RingPlace<kStages> at;
    RingPlace<1> of_x;
    int m = -1;
    for (Tile tile = first(); tile.left > 0; tile = after(tile), at.next()) {
      if (tile.m != m) {
        m = tile.m;
        load(memory + kOfX, x, m, &barriers.x_full, &barriers.x_empty, of_x.parity);
        of_x.next();
      }
      load(memory + at.stage * kStage, y, tile.n, barriers.full + at.stage, barriers.empty + at.stage, at.parity);
    }
  }

  /// For the assembler to leave products in flight, accumulators have names (registers have no index) and products are
  /// given whether there is a tile or not (C7515, "serialized", else).
  NEARFAR_DEVICE void multiply(char* memory, Barriers& barriers) const {
    const bool speaker = cuda::thread_index() % 128 == 0;
    const int group = cuda::warp_index() / 4;
    RingPlace<kStages> at;
    RingPlace<1> of_x;
    int m = -1;
    // Without a tile these are products of what is left in memory, which nobody reads.
    const auto begin = [&](const Tile& tile, Accumulators& acc) {
      P::clear(acc);
      if (tile.left > 0) {
        if (tile.m != m) {
          if (m >= 0 && speaker) cuda::barrier_arrive(&barriers.x_empty);
          m = tile.m;
          cuda::barrier_wait(&barriers.x_full, of_x.parity);
          of_x.next();
        }
        cuda::barrier_wait(barriers.full + at.stage, at.parity);
      }
      const char *own = memory + kOfX, *other = memory + at.stage * kStage;
      int step = 0;
      do {
        cuda::wgmma_begin();
        NEARFAR_UNROLL
        for (int k = 0; k < 4; ++k)
          cuda::wgmma<E, false, false>(acc.v, P::template view<Rows>(own + step * Blocked::kBytes, group, k),
                                       P::template view<Rows>(other + step * Blocked::kBytes, 0, k));
        cuda::wgmma_commit();
      } while (++step < steps);
    };
    const auto end = [&](const Tile& tile, Accumulators& acc) {
      cuda::wgmma_wait<0>();
      cuda::wgmma_fence(acc.v);
      if (tile.left > 0 && speaker) cuda::barrier_arrive(barriers.empty + at.stage);
      at.next();
    };
    Accumulators even, odd;
    Tile tile = first();
    begin(tile, even);
    end(tile, even);
    const auto turn = [&](Accumulators& ready, Accumulators& other) {
      const Tile next = after(tile);
      begin(next, other);
      epilogue.template apply<P>(
          Fragment<P>{ready, int64_t(tile.m) * P::kM, int64_t(tile.n) * P::kN, memory + kForEpilogue}, tile.m, tile.n,
          0);
      end(next, other);
      tile = next;
    };
    while (tile.left > 0) {
      turn(even, odd);
      if (tile.left <= 0) break;
      turn(odd, even);
    }
  }
};

/// steps: of the depth, 1 to kOverlapSteps.
template <class E, class Epilogue>
void launch_overlap(cuda::Context& c, const BlockedOperand<true, E>& x, const BlockedOperand<true, E>& y,
                    int64_t tiles_m, int64_t tiles_n, int64_t steps, const Epilogue& epilogue) {
  using Kernel = OverlapKernel<E, Epilogue>;
  const int64_t tiles = tiles_m * tiles_n, fit = c.device.multiprocessors;
  if (tiles > INT32_MAX) throw std::runtime_error("CUDA: more than 2^31 tiles");
  c.launch_large(tiles < fit ? tiles : fit, Kernel::kMemory,
                 Kernel{x, y, static_cast<int>(tiles_m), static_cast<int>(tiles_n), static_cast<int>(steps), epilogue});
}

}  // namespace device
}  // namespace nearfar
