// Screening: which columns can still matter for a row, found with products of 16-bit integers at up to twice the
// float32 rate.
//
// A row x is rounded to x' = s q, where s is a number and q holds integers with |q| <= 2^15.5. Then every sum of
// products of two such rows fits into 32 bits, and so does every part of it (Cauchy and Schwarz): integer sums are
// exact. With
//
//   |<x, y> - <x', y'>| = |<x - x', y> + <x', y - y'>| <= |x - x'| |y| + |x'| |y - y'|,
//
// plus the rounding of the float32 sum, no score is further from the engine's than a bound that the norms of what was
// rounded away keep tight: 1.6e-4 |x| |y| at 128 dimensions. What cannot be decided within the bound is scored by
// the very arithmetic of the engine, or measured, so the answers are those of the float32 scan, bit for bit.
//
// One instruction multiplies and adds in pairs: pmaddwd of SSE2 and AVX2 (a sum follows), vpdpwssd of AVX512-VNNI.
#pragma once

#include <chrono>

#include "cpu/tile.hpp"

namespace nearfar {
namespace {

using PairVec = IVec<float>;  // two 16-bit integers a lane

/// sum + a0 b0 + a1 b1.
NEARFAR_INLINE PairVec multiply_pairs(PairVec sum, PairVec a, PairVec b) {
#if defined(__AVX512VNNI__)
  return (PairVec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (PairVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return sum + (PairVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (PairVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

/// Two integers of 16 bits in one of 32.
NEARFAR_INLINE PairVec pair_of(PairVec low, PairVec high) { return (low & 0xffff) | high << 16; }

NEARFAR_INLINE Vec<float> to_float(PairVec v) { return __builtin_convertvector(v, Vec<float>); }

/// Seconds for a run of products from registers, of pairs or of float32 numbers.
template <bool PAIRS>
__attribute__((noinline)) double product_seconds() {
  constexpr int64_t kSteps = 20000;
  constexpr int kSums = kVectorBytes == 64 ? 24 : 12;
  using V = std::conditional_t<PAIRS, PairVec, Vec<float>>;
  V sum[kSums];
#pragma GCC unroll 24
  for (int u = 0; u < kSums; ++u)
    sum[u] = V{} + static_cast<std::conditional_t<PAIRS, int, float>>(u);  // or they are one
  V a = V{} + 1, b = V{} + 2;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t k = 0; k < kSteps; ++k)
#pragma GCC unroll 24
    for (int u = 0; u < kSums; ++u) {
#if defined(__x86_64__)
      asm volatile("" : "+v"(a), "+v"(b));  // or one product serves every sum
#endif
      if constexpr (PAIRS) {
        sum[u] = multiply_pairs(sum[u], a, b);
      } else {
        sum[u] += a * b;
      }
    }
  const auto end = std::chrono::steady_clock::now();
#pragma GCC unroll 24
  for (int u = 1; u < kSums; ++u) sum[0] += sum[u];
  volatile auto sink = sum[0][0];
  (void)sink;
  return std::chrono::duration<double>(end - begin).count();
}

/// Whether products of pairs are faster here than float32 ones by more than screening costs: measured once, since that
/// differs between CPUs of one instruction set. It decides time, not results.
inline bool screening_pays() {
  static const bool pays = [] {
    constexpr double kGain = 1.2;
    double pairs = 1e9, singles = 1e9;
    for (int repeat = 0; repeat < 5; ++repeat) {
      pairs = std::fmin(pairs, product_seconds<true>());
      singles = std::fmin(singles, product_seconds<false>());
    }
    return 2 * singles > kGain * pairs;  // a pair is two multiply-adds
  }();
  return pays;
}

/// Whether a search over d dimensions is screened.
inline bool screens(Screening mode, int64_t d) {
  constexpr int64_t kLeastDims = 32, kMostDims = 1 << 18;  // fewer leave little to save; of more, |q| may be larger
  return d >= kLeastDims && d <= kMostDims &&
         (mode == Screening::always || (mode == Screening::automatic && screening_pays()));
}

class Screen {
  using T = float;
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr int kTileVectors = (P::MR + kLanes<T> - 1) / kLanes<T>;

 public:
  Screen(const Operands<T>& operands, int threads)
      : o_(operands),
        steps_(ceil_div(o_.d, 2)),
        rounding_(static_cast<T>(2 * o_.d + 16) * 0x1p-24f),
        safe_(1.0001f + static_cast<T>(o_.d) * 0x1p-24f),
        tiles_(o_.chunks.tiles * steps_ * P::MR + kTileVectors * kLanes<T>),
        scale_(o_.chunks.tiles * P::MR),
        norm_(o_.chunks.count),
        lost_(o_.chunks.count) {
    parallel_for(o_.chunks.count, threads, [&](int64_t chunk, int) {
      norm_[chunk] = lost_[chunk] = 0;
      Buffer<T> rows(room(P::MR));
      for (int64_t t = o_.chunks.tile_begin(chunk); t < o_.chunks.tile_end(chunk); ++t) pack_tile(t, chunk, rows.get());
    });
    for (int64_t chunk = 0; chunk < o_.chunks.count; ++chunk)
      largest_norm_ = largest_norm_ < norm_[chunk] ? norm_[chunk] : largest_norm_;
  }

  /// The panels of a strip of x, rounded; per lane s, |x| and |x - x'|.
  struct Strip {
    Buffer<int32_t> pairs;
    alignas(64) T scale[P::kStripRows], norm[P::kStripRows], lost[P::kStripRows];
    bool covered[P::kPanels];  // whether the bound holds: not for infinite rows, NaN, and norms whose squares overflow
  };
  /// Room for W rows of `read_rows`, and a vector more.
  int64_t room(int64_t w) const { return w * padded<T>(o_.d) + kLanes<T>; }
  void open(Strip& strip) const { strip.pairs = Buffer<int32_t>(P::kPanels * steps_ * NR); }

  /// Rounds panel q of a strip from rows as `read_rows` leaves them.
  void pack_panel(const T* rows, int64_t q, Strip& strip) const {
    const int64_t at = q * NR;
    round<NR>(rows, strip.pairs.get() + at * steps_, strip.scale + at, strip.norm + at, strip.lost + at);
    strip.covered[q] = covers_columns();
    for (int64_t lane = at; lane < at + NR; ++lane) strip.covered[q] &= strip.norm[lane] < kMostNorm;
  }

  /// Approximate dot products S[columns][NR] of a chunk.
  void block(int64_t chunk, const Strip& strip, int64_t q, T* scores) const {
    const int32_t* pairs = strip.pairs.get() + q * steps_ * NR;
    for (int64_t t = o_.chunks.tile_begin(chunk); t < o_.chunks.tile_end(chunk); ++t, scores += P::MR * NR) {
      const int32_t* tile = tiles_.get() + t * steps_ * P::MR;
      PairVec sum[P::MR][P::kVectors];
#pragma GCC unroll 12
      for (int r = 0; r < P::MR; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) sum[r][v] = PairVec{};
      for (int64_t k = 0; k < steps_; ++k) {
        PairVec own[P::kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) std::memcpy(&own[v], pairs + k * NR + v * kLanes<T>, sizeof own[v]);
#pragma GCC unroll 12
        for (int r = 0; r < P::MR; ++r) {
          const PairVec other = isplat<T>(tile[k * P::MR + r]);
#pragma GCC unroll 2
          for (int v = 0; v < P::kVectors; ++v) sum[r][v] = multiply_pairs(sum[r][v], other, own[v]);
        }
      }
#pragma GCC unroll 12
      for (int r = 0; r < P::MR; ++r) {
        const T scale = scale_[t * P::MR + r];
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) {
          // One factor after the other: their product may be too small.
          const Vec<T> own = load(strip.scale + q * NR + v * kLanes<T>);
          store(scores + r * NR + v * kLanes<T>, to_float(sum[r][v]) * own * scale);
        }
      }
    }
  }

  /// The same for one row, scores[columns]: columns lie along the lanes, the row is broadcast.
  void row(int64_t chunk, const Strip& strip, int64_t q, int64_t lane, T* scores) const {
    const int32_t* own = strip.pairs.get() + q * steps_ * NR + lane;
    const T scale = strip.scale[q * NR + lane];
    for (int64_t t = o_.chunks.tile_begin(chunk); t < o_.chunks.tile_end(chunk); ++t, scores += P::MR) {
      PairVec sum[kTileVectors] = {};
      for (int64_t k = 0; k < steps_; ++k) {
        const PairVec pair = isplat<T>(own[k * NR]);
#pragma GCC unroll 2
        for (int v = 0; v < kTileVectors; ++v) {
          PairVec columns;  // past the end of a tile there is the next, or room
          std::memcpy(&columns, tiles_.get() + (t * steps_ + k) * P::MR + v * kLanes<T>, sizeof columns);
          sum[v] = multiply_pairs(sum[v], pair, columns);
        }
      }
      alignas(64) T out[kTileVectors * kLanes<T>];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVectors; ++v) store(out + v * kLanes<T>, to_float(sum[v]) * scale);
      for (int r = 0; r < P::MR; ++r) scores[r] = out[r] * scale_[t * P::MR + r];
    }
  }

  /// What a dot product of `block` may differ by from the exact one and from the engine's, for a vector of rows and
  /// every column of a chunk. The last terms are the rounding of float32 sums, and what is flushed to zero.
  NEARFAR_INLINE Vec<T> bound(int64_t chunk, const Strip& strip, int64_t at) const {
    const Vec<T> norm = load(strip.norm + at), lost = load(strip.lost + at);
    return lost * norm_[chunk] + (norm + lost) * lost_[chunk] + norm * (norm_[chunk] * rounding_) + 0x1p-100f;
  }
  /// What rounding adds to a key that is made of the score and the squared norm `own` of a row.
  NEARFAR_INLINE Vec<T> rounding(int64_t chunk, Vec<T> own) const {
    return (own + norm_[chunk] * norm_[chunk]) * rounding_;
  }

  /// Screening that decides too little is given up. It costs the time of half a product: whoever screens says how much
  /// of the work had to be done all the same. Answers do not depend on it.
  bool helps() const {
    return covers_columns() &&
           8 * __atomic_load_n(&open_, __ATOMIC_RELAXED) <= __atomic_load_n(&seen_, __ATOMIC_RELAXED);
  }
  void report(int64_t open, int64_t seen) const {
    __atomic_fetch_add(&open_, open, __ATOMIC_RELAXED);
    __atomic_fetch_add(&seen_, seen, __ATOMIC_RELAXED);
  }

 private:
  bool covers_columns() const { return largest_norm_ < kMostNorm; }

  // |q| after rounding stays below 2^15.5 = 46340, entries below 2^15.
  static constexpr T kNorm = 45000, kEntry = 32766, kMagic = 0x1.8p23f;
  static constexpr T kLeastNorm = 0x1p-100f, kMostNorm = 0x1p60f;

  void pack_tile(int64_t t, int64_t chunk, T* rows) {
    T norm[P::MR], lost[P::MR];
    read_rows<P::MR>(o_.y, t * P::MR, rows);
    round<P::MR>(rows, tiles_.get() + t * steps_ * P::MR, scale_.get() + t * P::MR, norm, lost);
    for (int r = 0; r < P::MR; ++r) {
      if (!(norm[r] < kMostNorm)) norm[r] = std::numeric_limits<T>::infinity();
      norm_[chunk] = norm_[chunk] < norm[r] ? norm[r] : norm_[chunk];
      lost_[chunk] = lost_[chunk] < lost[r] ? lost[r] : lost_[chunk];
    }
  }

  /// W rows, rounded and side by side: pairs[step][W], and s, |x| and |x - x'| of each. A row that is too small counts
  /// as lost. Which coordinates make a pair does not matter as long as it is the same for x and y: what a vector holds
  /// and what the next one holds, of a last part of r coordinates the first r / 2 and the others.
  template <int W>
  void round(const T* rows, int32_t* pairs, T* scales, T* norms, T* losts) const {
    constexpr int L = kLanes<T>;
    const int64_t stride = padded<T>(o_.d);
    T inverses[W];
    Vec<T> rest[W];
    for (int r = 0; r < W; ++r) {
      Vec<T> square = {}, most = {};
      for (int64_t k = 0; k < stride; k += L) {
        const Vec<T> own = load(rows + r * stride + k);
        square += own * own;
        most = vmax(absolute(own), most);
      }
      rest[r] = Vec<T>{};
      norms[r] = std::sqrt(hsum<T>(square)) * safe_;
      const bool tiny = norms[r] < kLeastNorm;
      const T by_norm = norms[r] * (1 / kNorm), by_entry = hmax<T>(most) * (1 / kEntry);
      scales[r] = tiny ? T(0) : by_norm > by_entry ? by_norm : by_entry;
      inverses[r] = tiny ? T(0) : 1 / scales[r];
    }
    interleave<W, T>(steps_, pairs, [&](int r, int64_t step) {
      const int64_t first = 2 * step, left = ceil_div(o_.d - first, 2), half = left < L ? left : L;
      const IVec<T> inside = iota<T>() < isplat<T>(static_cast<int32_t>(half));
      const T* from = rows + r * stride + first;  // a row ends before `half`, memory behind the last one does not
      PairVec halves[2];
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const Vec<T> own = select(inside, load(from + h * half), Vec<T>{}), shifted = own * inverses[r] + kMagic;
        const Vec<T> difference = own - (shifted - kMagic) * scales[r];
        halves[h] = (PairVec)shifted - (PairVec)splat<T>(kMagic);
        rest[r] += difference * difference;
      }
      return (Vec<T>)pair_of(halves[0], halves[1]);
    });
    for (int r = 0; r < W; ++r) losts[r] = std::sqrt(hsum<T>(rest[r])) * safe_ + norms[r] * 0x1p-22f;
  }

  const Operands<T>& o_;
  const int64_t steps_;
  const T rounding_, safe_;
  Buffer<int32_t> tiles_;
  Buffer<T> scale_, norm_, lost_;
  T largest_norm_ = 0;
  mutable int64_t open_ = 0, seen_ = 0;
};

}  // namespace
}  // namespace nearfar
