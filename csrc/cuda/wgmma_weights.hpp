// Products of float32 weights and float32 rows on Hopper's tensor cores: what a gradient multiplies, with the accuracy
// of float32.
//
// w = 2^a (h + l) and y = 2^b (h' + l'), where h and l are float16: of numbers under one power of two they leave out
// 2^-24, or if that is more 2^-39 of the largest. So there is a power for every row, and for the 64 weights of a line
// that are summed at once;  w y = 2^(a + b) (h h' + h l' + l h')  leaves out another 2^-24. Tensor cores cut sums off
// where others round them: these begin anew with every 64 weights, small products first, and are added up as float32.
//
// Rows are split once, in memory. Weights are split in the registers of the warps that multiply them: they are read as
// they lie, in both directions, and take no other memory. bfloat16 would need no powers of two, but six products.
#pragma once

#include "cuda/wgmma_wide.hpp"

namespace nearfar {
inline namespace device {

/// 2^14 over the power of two at or below `most`, which goes up to all that is finite; and its inverse, times 2^-14.
struct Power {
  static constexpr uint32_t kOne = 1u << 23, kLeast = 30 * kOne, kMost = 0x7f800000u;
  uint32_t bits;
  NEARFAR_DEVICE explicit Power(float most) : bits(cuda::bits_of(most) & kMost) {
    if (bits < kLeast) bits = kLeast;
  }
  NEARFAR_DEVICE float up() const { return cuda::float_of(268 * kOne - bits); }
  NEARFAR_DEVICE float down() const { return cuda::float_of(bits - 28 * kOne); }
  NEARFAR_DEVICE float itself() const { return cuda::float_of(bits); }
};

/// Packed rows i as 2^-14 factor_i (high + low). Of every sixteen, row 4 q + e lies where the tensor cores take what
/// lane q of four holds of the weights as its e-th, so that these are neighbours in memory.
struct SplitRows {
  Blocked high, low;
  const float* factor = nullptr;

  NEARFAR_DEVICE static int64_t place(int64_t i) {
    const int within = static_cast<int>(i % 16), q = within / 4, e = within % 4;
    return i - within + 2 * q + e % 2 + e / 2 * 8;
  }
  /// From row block `down` on.
  SplitRows from(int64_t down) const {
    const int64_t before = down * high.across * Blocked::kBlock;
    return {{high.data + before, high.across}, {low.data + before, low.across}, factor + down * Blocked::kRows};
  }
};

/// A warp a row. Rows of zeros, as in padding, have a factor of 0: their weights may be anything.
struct SplitInPieces {
  const float* rows;
  int64_t pitch, count;
  SplitRows out;
  float* factor;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= count) return;
    constexpr int W = Wide<float>::kWide;
    const float* row = rows + i * pitch;
    float most = 0;
    for_row(Wide<float>{}, pitch, [&](int64_t k) {
      const auto own = load_piece<W>(row + k);
      NEARFAR_UNROLL
      for (int e = 0; e < W; ++e) most = finite(own[e]) ? largest(most, absolute(own[e])) : most;
    });
    for (int mask = cuda::kWarp / 2; mask > 0; mask /= 2) most = largest(most, cuda::shuffle_xor(most, mask));
    const Power power(most);
    if (cuda::lane_index() == 0) factor[i] = most > 0 ? power.itself() : 0.0f;
    const int64_t place = SplitRows::place(i);
    for_row(Wide<float>{}, pitch, [&](int64_t k) {
      const auto own = load_piece<W>(row + k);
      uint16_t *high = out.high.at(place, k), *low = out.low.at(place, k);
      NEARFAR_UNROLL
      for (int e = 0; e < W; ++e) {
        const float value = own[e] * power.up();
        const F16 first = narrow<F16>(value);
        high[e] = first.bits;
        low[e] = narrow<F16>(finite(value) ? value - widen(first) : 0.0f).bits;
      }
    });
  }
  NEARFAR_DEVICE static bool finite(float x) { return absolute(x) < infinity<float>(); }
};

/// `padded` rows of `pitch` numbers.
inline SplitRows split_rows(cuda::Context& c, const float* rows, int64_t padded, int64_t pitch) {
  const int64_t size = Blocked::size(padded, pitch), across = ceil_div(pitch, Blocked::kColumns);
  float* factor = c.take<float>(padded);
  const SplitRows out{{c.take<uint16_t>(size), across}, {c.take<uint16_t>(size), across}, factor};
  c.launch_warps(padded, SplitInPieces{rows, pitch, padded, out, factor});
  return out;
}

/// TRANSPOSE: the sum goes down the columns of the weights; a thread then has two neighbouring ones in place of rows
/// eight apart.
template <bool TRANSPOSE>
struct WgmmaWeights : WgmmaProduct {
  static constexpr int kPlane = 2 * kHalf, kFactors = 2 * kPlane;  // of a stage: 64 rows of 128 numbers, twice
  static constexpr int kStage = kFactors + 1024, kBytes = kDepth * sizeof(float);  // of factors
  static constexpr int kApart = TRANSPOSE ? 2 : 1;
  static constexpr int kSpeakers = cuda::kWarps;  // every warp reads factors by itself
  NEARFAR_DEVICE static int row(int a) {
    return cuda::warp_index() * 16 + cuda::lane_index() / 4 * kApart + a * (TRANSPOSE ? 1 : 8);
  }
  template <class Epilogue>
  NEARFAR_DEVICE static void apply(const Epilogue& epilogue, Accumulators& acc, int m, int n, int split, int,
                                   char* memory) {
    epilogue.template apply<WgmmaWeights>(Fragment<WgmmaWeights>{acc, int64_t(m) * kM, int64_t(n) * kN, memory}, m, n,
                                          split);
  }
  /// Step k of the rows, columns from tile n on; what would lie outside is left out.
  template <class A>
  NEARFAR_DEVICE static void load(char* stage, const A&, int, int, const SplitRows& b, int n, int k,
                                  uint64_t* barrier) {
    const int left = static_cast<int>(b.high.across) - 2 * n, pieces = left < 2 ? left : 2;
    cuda::barrier_expect(barrier, 2 * pieces * kHalf + kBytes);
    for (int piece = 0; piece < pieces; ++piece) {
      load_half(stage + piece * kHalf, b.high, 2 * n + piece, k, barrier);
      load_half(stage + kPlane + piece * kHalf, b.low, 2 * n + piece, k, barrier);
    }
    cuda::bulk_load(stage + kFactors, b.factor + k * kDepth, kBytes, barrier);
  }

  /// The weights of the next step are on their way while one is multiplied.
  template <class A, class B, class Ring>
  NEARFAR_DEVICE static void sum(const A& a, int m, int first, int steps, Ring& ring, Accumulators& acc) {
    const float* from = a.at(int64_t(m) * kM + row(0), int64_t(first) * kDepth + cuda::lane_index() % 4 * 4);
    float w[2][16];
    read(from, a.stride, w);
    NEARFAR_ROLLED
    for (int k = 0; k < steps; ++k, ring.next()) {
      const char* stage = ring.wait_full();
      uint32_t high[4][4], low[4][4];
      float down[2];
      split(w, reinterpret_cast<const float*>(stage + kFactors), high, low, down);
      if (k + 1 < steps) from += TRANSPOSE ? kDepth * a.stride : kDepth;
      read(from, a.stride, w);
      float part[16][4];
      cuda::wgmma_fence(low);
      cuda::wgmma_fence(high);
      ring.take_turn();
      cuda::wgmma_begin();
      multiply<true>(part, low, stage);
      multiply<false>(part, high, stage + kPlane);
      multiply<false>(part, high, stage);
      cuda::wgmma_commit();
      ring.pass_turn();
      cuda::wgmma_wait<0>();
      cuda::wgmma_fence(part);
      ring.free(ring.stage);
      NEARFAR_UNROLL
      for (int n = 0; n < 16; ++n) NEARFAR_UNROLL
      for (int q = 0; q < 4; ++q) acc.v[n][q] += part[n][q] * down[q / 2];
    }
  }

 private:
  NEARFAR_DEVICE static void load_half(char* to, const Blocked& from, int piece, int k, uint64_t* barrier) {
    cuda::bulk_load(to, reinterpret_cast<const char*>(from.block(k / 2, piece)) + k % 2 * kHalf, kHalf, barrier);
  }
  /// A thread's weights of a step: [a][4 s + e] is of its row a, and of the sum the e-th of four in the s-th sixteen.
  NEARFAR_DEVICE static void read(const float* from, int64_t stride, float (&w)[2][16]) {
    NEARFAR_UNROLL
    for (int s = 0; s < 4; ++s) {
      if constexpr (TRANSPOSE) {
        NEARFAR_UNROLL
        for (int e = 0; e < 4; ++e) {
          const auto two = *reinterpret_cast<const Two<float>*>(from + (16 * s + e) * stride);
          w[0][4 * s + e] = two.first, w[1][4 * s + e] = two.second;
        }
      } else {
        NEARFAR_UNROLL
        for (int a = 0; a < 2; ++a) {
          const auto four = load_piece<4>(from + 8 * a * stride + 16 * s);
          NEARFAR_UNROLL
          for (int e = 0; e < 4; ++e) w[a][4 * s + e] = four[e];
        }
      }
    }
  }
  /// w times the factors of the rows it will be multiplied by = 2^14 down (high + low).
  NEARFAR_DEVICE static void split(float (&w)[2][16], const float* factor, uint32_t (&high)[4][4],
                                   uint32_t (&low)[4][4], float (&down)[2]) {
    float most[2] = {0, 0}, up[2];
    NEARFAR_UNROLL
    for (int s = 0; s < 4; ++s) {
      const auto own = load_piece<4>(factor + 16 * s + cuda::lane_index() % 4 * 4);
      NEARFAR_UNROLL
      for (int a = 0; a < 2; ++a) NEARFAR_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& value = w[a][4 * s + e];
        value *= own[e];
        most[a] = largest(most[a], absolute(value));
      }
    }
    NEARFAR_UNROLL
    for (int a = 0; a < 2; ++a) {
      for (int mask = 1; mask < kRowLanes; mask *= 2) most[a] = largest(most[a], cuda::shuffle_xor(most[a], mask));
      const Power power(most[a]);
      up[a] = power.up(), down[a] = power.down();
    }
    NEARFAR_UNROLL
    for (int s = 0; s < 4; ++s) NEARFAR_UNROLL
    for (int word = 0; word < 4; ++word) {
      const int a = word % 2, at = 4 * s + word / 2 * 2;
      const float x = w[a][at] * up[a], y = w[a][at + 1] * up[a];
      const uint32_t bits = high[s][word] = cuda::pack_pair<F16>(x, y);
      low[s][word] = cuda::pack_pair<F16>(x - widen(F16{static_cast<uint16_t>(bits)}),
                                          y - widen(F16{static_cast<uint16_t>(bits >> 16)}));
    }
  }
  template <bool FRESH>
  NEARFAR_DEVICE static void multiply(float (&part)[16][4], const uint32_t (&w)[4][4], const char* rows) {
    NEARFAR_UNROLL
    for (int s = 0; s < 4; ++s)
      cuda::wgmma_registers(part, w[s], cuda::descriptor(rows + s * 2048, kHalf, 1024), FRESH && s == 0);
  }
};

}  // namespace device
}  // namespace nearfar
