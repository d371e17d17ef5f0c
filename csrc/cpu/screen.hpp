// Screening: which columns can still matter for a row, found with bfloat16 products at twice the float32 rate.
//
// With x' and y' the points rounded to bfloat16,
//
//   |<x, y> - <x', y'>| = |<x - x', y> + <x', y - y'>| <= |x - x'| |y| + |x'| |y - y'|,
//
// plus the rounding of both sums, is a bound that holds for every pair and that the norms of what was rounded away keep
// tight (a third of the bound from the unit roundoff alone). A column whose approximate key exceeds what a row keeps by
// more than its bound cannot be better; the others are scored in float32 by the very arithmetic of the engine. So the
// answer is that of the float32 scan, bit for bit.
//
// The product is one instruction where the CPU has AVX512-BF16. Elsewhere the same pairs are multiplied as float32,
// which gains nothing: it is there so that every CPU can test what only some use.
#pragma once

#include <chrono>

#include "cpu/tile.hpp"

namespace nearfar {
namespace {

using PairVec = VecTraits<float>::UintVector;  // two bfloat16 a lane: coordinates 2 k and 2 k + 1

NEARFAR_INLINE Vec<float> as_float(PairVec v) {
  Vec<float> out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

NEARFAR_INLINE PairVec as_bits(Vec<float> v) {
  PairVec out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

/// acc += a0 b0 + a1 b1.
NEARFAR_INLINE void multiply_pairs(Vec<float>& acc, PairVec a, PairVec b) {
#if defined(__AVX512BF16__)
  acc = _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  acc += as_float(a << 16) * as_float(b << 16);
  acc += as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
#endif
}

/// The bits of x rounded to nearest even bfloat16, in the upper half; NaN stays NaN.
NEARFAR_INLINE PairVec round_to_bfloat16(Vec<float> x) {
  const PairVec bits = as_bits(x), even = (bits >> 16) & 1u;
  return select(x == x, (bits + 0x7fffu + even) & 0xffff0000u, (bits | 0x00400000u) & 0xffff0000u);
}

#if defined(__AVX512BF16__)
/// Seconds for a run of products from registers, of pairs or of float32 numbers.
template <bool PAIRS>
__attribute__((noinline)) double product_seconds() {
  constexpr int64_t kSteps = 20000;
  constexpr int kAccumulators = 24;
  Vec<float> sum[kAccumulators];
#pragma GCC unroll 24
  for (int u = 0; u < kAccumulators; ++u) sum[u] = splat<float>(static_cast<float>(u));  // or they are one
  PairVec a = as_bits(splat<float>(0.25f)), b = as_bits(splat<float>(0.5f));
  asm volatile("" : "+v"(a), "+v"(b));
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t k = 0; k < kSteps; ++k)
#pragma GCC unroll 24
    for (int u = 0; u < kAccumulators; ++u) {
      if (PAIRS) {
        multiply_pairs(sum[u], a, b);
      } else {
        sum[u] += as_float(a) * as_float(b);
      }
    }
  const auto end = std::chrono::steady_clock::now();
#pragma GCC unroll 24
  for (int u = 1; u < kAccumulators; ++u) sum[0] += sum[u];
  volatile float sink = hsum<float>(sum[0]);
  (void)sink;
  return std::chrono::duration<double>(end - begin).count();
}
#endif

/// Whether products of pairs are faster here than float32 ones by more than screening costs: measured once, since CPUs
/// that have the instruction differ by a factor of four. It decides time, not results.
inline bool screening_pays() {
#if defined(__AVX512BF16__)
  static const bool pays = [] {
    constexpr double kGain = 1.4;
    double pairs = 1e9, singles = 1e9;
    for (int repeat = 0; repeat < 3; ++repeat) {
      pairs = std::fmin(pairs, product_seconds<true>());
      singles = std::fmin(singles, product_seconds<false>());
    }
    return 2 * singles > kGain * pairs;  // a pair is two multiply-adds
  }();
  return pays;
#else
  return false;
#endif
}

/// Whether a search over d dimensions is screened.
inline bool screens(Screening mode, int64_t d) {
  constexpr int64_t kLeastDims = 48;  // fewer leave too little to save
  return d >= kLeastDims && (mode == Screening::always || (mode == Screening::automatic && screening_pays()));
}

class Screen {
  using T = float;
  using P = Policy<T>;
  static constexpr int NR = P::NR;

 public:
  Screen(const Operands<T>& operands, int threads)
      : o_(operands),
        steps_(ceil_div(o_.d, 2)),
        tiles_(o_.chunks.tiles * steps_ * P::MR),
        norm_(o_.chunks.count),
        lost_(o_.chunks.count) {
    parallel_for(o_.chunks.count, threads, [&](int64_t chunk, int) {
      norm_[chunk] = lost_[chunk] = 0;
      for (int64_t t = o_.chunks.tile_begin(chunk); t < o_.chunks.tile_end(chunk); ++t) pack_tile(t, chunk);
    });
  }

  int64_t panel_size() const { return steps_ * NR; }

  /// Rounds a packed panel; per lane |x| or |x'|, whichever is larger, and |x - x'|.
  void pack_panel(const T* panel, uint32_t* pairs, T* norm, T* lost) const {
    for (int v = 0; v < P::kVectors; ++v) {
      Vec<T> square = {}, rounded_square = {}, rest = {};
      for (int64_t k = 0; k < steps_; ++k) {
        PairVec halves[2];
        for (int h = 0; h < 2; ++h) {
          const Vec<T> own = 2 * k + h < o_.d ? load(panel + (2 * k + h) * NR + v * kLanes<T>) : Vec<T>{};
          halves[h] = round_to_bfloat16(own);
          const Vec<T> rounded = as_float(halves[h]), difference = own - rounded;
          square += own * own;
          rounded_square += rounded * rounded;
          rest += difference * difference;
        }
        const PairVec pair = (halves[0] >> 16) | halves[1];
        std::memcpy(pairs + k * NR + v * kLanes<T>, &pair, sizeof pair);
      }
      store(norm + v * kLanes<T>, sqrt(vmax(square, rounded_square)) * kSafe);
      store(lost + v * kLanes<T>, sqrt(rest) * kSafe);
    }
  }

  /// Approximate dot products S[columns][NR] of a chunk.
  void block(int64_t chunk, const uint32_t* pairs, T* scores) const {
    for (int64_t t = o_.chunks.tile_begin(chunk); t < o_.chunks.tile_end(chunk); ++t, scores += P::MR * NR) {
      const uint32_t* tile = tiles_.get() + t * steps_ * P::MR;
      Vec<T> acc[P::MR][P::kVectors];
      clear<T>(acc);
      for (int64_t k = 0; k < steps_; ++k) {
        PairVec own[P::kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) std::memcpy(&own[v], pairs + k * NR + v * kLanes<T>, sizeof own[v]);
#pragma GCC unroll 12
        for (int r = 0; r < P::MR; ++r) {
          const PairVec other = tile[k * P::MR + r] - PairVec{};
#pragma GCC unroll 2
          for (int v = 0; v < P::kVectors; ++v) multiply_pairs(acc[r][v], other, own[v]);
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < P::MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) store(scores + r * NR + v * kLanes<T>, acc[r][v]);
    }
  }

  /// Lanes of a panel at `row` that have a row whose norm is a number; the others are at no distance from anything.
  NEARFAR_INLINE IVec<T> lanes(int64_t row, int v, Vec<T> norm) const {
    const int64_t last = o_.x.n() - row < NR ? o_.x.n() - row : NR;
    const IVec<T> lane = iota<T>() + isplat<T>(static_cast<IntOf<T>>(v * kLanes<T>));
    return (lane < isplat<T>(static_cast<IntOf<T>>(last))) & (norm < splat<T>(std::numeric_limits<T>::infinity()));
  }

  /// What a dot product of `block` may differ by from the engine's, for one row and every column of a chunk. The last
  /// term is the rounding of both sums, and what is flushed to zero.
  NEARFAR_INLINE Vec<T> bound(int64_t chunk, Vec<T> norm, Vec<T> lost) const {
    const T rounding = static_cast<T>(2 * o_.d + 16) * 0x1p-24f;
    return lost * norm_[chunk] + norm * lost_[chunk] + norm * norm_[chunk] * rounding + 0x1p-100f;
  }
  /// What rounding adds to a key that is made of the score and the squared norm `own` of a row.
  NEARFAR_INLINE Vec<T> rounding(int64_t chunk, Vec<T> own) const {
    return (own + norm_[chunk] * norm_[chunk]) * (static_cast<T>(2 * o_.d + 16) * 0x1p-24f);
  }

  /// use(j, scores[NR]) in ascending order for the columns [begin, end) of which looks(j, v) holds in some lane, with
  /// exact scores. `looks` reads what `use` has changed at most kColumns columns late.
  template <class Looks, class Use>
  void settle(int64_t begin, int64_t end, const T* packed, Looks looks, Use use) const {
    constexpr int64_t kAtOnce = 8;
    int64_t found[kColumns];
    int count = 0;
    auto score = [&] {
      alignas(64) T scores[kColumns * NR];
      exact(found, count, packed, scores);
      for (int c = 0; c < count; ++c) use(found[c], scores + c * NR);
      count = 0;
    };
    for (int64_t j0 = begin; j0 < end; j0 += kAtOnce) {
      const int64_t j1 = j0 + kAtOnce < end ? j0 + kAtOnce : end;
      IVec<T> look = IVec<T>{};
      for (int v = 0; v < P::kVectors; ++v)
        for (int64_t j = j0; j < j1; ++j) look |= looks(j, v);
      if (!any(look)) continue;
      for (int64_t j = j0; j < j1; ++j) {
        look = IVec<T>{};
        for (int v = 0; v < P::kVectors; ++v) look |= looks(j, v);
        if (!any(look)) continue;
        found[count++] = j;
        if (count == kColumns) score();
      }
    }
    if (count) score();
  }

 private:
  /// Exact scores of up to kColumns columns, S[column][NR], as the engine computes them: one multiply-add a coordinate.
  static constexpr int kColumns = P::MR / 3 * 2;
  void exact(const int64_t* columns, int count, const T* panel, T* scores) const {
    const T* own[kColumns];
    for (int c = 0; c < kColumns; ++c) {
      const int64_t j = columns[c < count ? c : count - 1];
      own[c] = o_.tile(j / P::MR) + j % P::MR;
    }
    Vec<T> acc[kColumns][P::kVectors];
    clear<T>(acc);
    for (int64_t k = 0; k < o_.d; ++k) {
      Vec<T> lanes[P::kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) lanes[v] = load(panel + k * NR + v * kLanes<T>);
#pragma GCC unroll 12
      for (int c = 0; c < kColumns; ++c) {
        const Vec<T> scalar = splat<T>(own[c][k * P::MR]);
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) Dot::accumulate(acc[c][v], scalar, lanes[v]);
      }
    }
#pragma GCC unroll 12
    for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) store(scores + c * NR + v * kLanes<T>, acc[c][v]);
  }

  static constexpr T kSafe = 1.0001f;  // norms are rounded up

  void pack_tile(int64_t t, int64_t chunk) {
    const T* rows = o_.tile(t);
    uint32_t* pairs = tiles_.get() + t * steps_ * P::MR;
    for (int r = 0; r < P::MR; ++r) {
      double square = 0, rounded_square = 0, rest = 0;
      for (int64_t k = 0; k < steps_; ++k) {
        uint32_t halves[2] = {0, 0};
        for (int h = 0; h < 2 && 2 * k + h < o_.d; ++h) {
          const T own = rows[(2 * k + h) * P::MR + r];
          std::memcpy(&halves[h], &own, sizeof own);
          halves[h] = (halves[h] + 0x7fffu + ((halves[h] >> 16) & 1u)) & 0xffff0000u;
          T rounded;
          std::memcpy(&rounded, &halves[h], sizeof rounded);
          square += static_cast<double>(own) * static_cast<double>(own);
          rounded_square += static_cast<double>(rounded) * static_cast<double>(rounded);
          rest += (static_cast<double>(own) - static_cast<double>(rounded)) *
                  (static_cast<double>(own) - static_cast<double>(rounded));
        }
        pairs[k * P::MR + r] = (halves[0] >> 16) | halves[1];
      }
      const T norm = static_cast<T>(std::sqrt(square > rounded_square ? square : rounded_square)) * kSafe;
      if (std::isfinite(norm)) {
        if (norm > norm_[chunk]) norm_[chunk] = norm;
        const T lost = static_cast<T>(std::sqrt(rest)) * kSafe;
        if (lost > lost_[chunk]) lost_[chunk] = lost;
      } else {
        // No bound covers this column: NaN, which is never screened out.
        for (int64_t k = 0; k < steps_; ++k) pairs[k * P::MR + r] = 0x7fc07fc0u;
      }
    }
  }

  const Operands<T>& o_;
  const int64_t steps_;
  Buffer<uint32_t> tiles_;
  Buffer<T> norm_, lost_;
};

}  // namespace
}  // namespace nearfar
