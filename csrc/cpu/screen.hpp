// Screening: which columns can still matter for a row, found with products of 8-bit integers at three times the
// float32 rate.
//
// A row x is rounded to x' = s q, where s is a number and q holds integers. With
//
//   |<x, y> - <x', y'>| = |<x - x', y> + <x', y - y'>| <= |x - x'| |y| + |x'| |y - y'|,
//
// which the norms of what was rounded away keep to about 2 % of |x| |y|, every column has a lowest and a highest rank
// that it can have for a row. Few columns reach the best of the lowest ranks (2 of 256, 60 of 20000 for ten
// neighbours); those are scored by the very arithmetic of the engine, or measured, so the answers are those of the
// float32 scan, bit for bit.
//
// One instruction multiplies and adds four products of an unsigned and a signed number: vpdpbusd of AVX512-VNNI, with
// sums of 32 bits. pmaddubsw of SSSE3 and AVX2 makes two sums of 16 bits of them; they are widened after kBlockSteps
// steps, and scales are such that no sum is larger before (Cauchy and Schwarz). Integer sums are exact. sdot of Arm has
// sums of 32 bits too; its first operand is signed, which changes nothing for numbers up to 127.
#pragma once

#include <chrono>
#include <limits>

#include "cpu/operands.hpp"

namespace nearfar {
namespace {

using Quads = IVec<float>;  // four 8-bit integers a lane

#if defined(__AVX512VNNI__) || !defined(__SSSE3__)
constexpr bool kWideSums = true;
#else
constexpr bool kWideSums = false;
#endif

/// sum + a0 b0 + a1 b1 + a2 b2 + a3 b3 of unsigned a and signed b, as one sum or as two of half the width.
NEARFAR_INLINE Quads multiply_quads(Quads sum, Quads a, Quads b) {
#if defined(__AVX512VNNI__)
  return (Quads)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return (Quads)_mm512_add_epi16((__m512i)sum, _mm512_maddubs_epi16((__m512i)a, (__m512i)b));
#elif defined(__AVX2__)
  return (Quads)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)a, (__m256i)b));
#elif defined(__SSSE3__)
  return (Quads)_mm_add_epi16((__m128i)sum, _mm_maddubs_epi16((__m128i)a, (__m128i)b));
#elif defined(__ARM_FEATURE_DOTPROD)
  return (Quads)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);  // a is at most 127
#else
  for (int shift = 0; shift < 32; shift += 8) sum += (a >> shift & 0xff) * (b << (24 - shift) >> 24);
  return sum;
#endif
}

/// The sum of what multiply_quads leaves in a lane.
NEARFAR_INLINE Quads widened(Quads sum) {
#if defined(__AVX512VNNI__)
  return sum;
#elif defined(__AVX512BW__)
  return (Quads)_mm512_madd_epi16((__m512i)sum, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
  return (Quads)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1));
#elif defined(__SSSE3__)
  return (Quads)_mm_madd_epi16((__m128i)sum, _mm_set1_epi16(1));
#else
  return sum;
#endif
}

NEARFAR_INLINE Vec<float> to_float(Quads v) { return __builtin_convertvector(v, Vec<float>); }

/// Seconds for a run of products from registers, of quads or of float32 numbers.
template <bool QUADS>
__attribute__((noinline)) double product_seconds() {
  constexpr int64_t kSteps = 20000;
  constexpr int kSums = kRegisters == 32 ? 24 : 12;
  using V = std::conditional_t<QUADS, Quads, Vec<float>>;
  V sum[kSums];
#pragma GCC unroll 24
  for (int u = 0; u < kSums; ++u)
    sum[u] = V{} + static_cast<std::conditional_t<QUADS, int, float>>(u);  // or they are one
  V a = V{} + 1, b = V{} + 2;
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t k = 0; k < kSteps; ++k)
#pragma GCC unroll 24
    for (int u = 0; u < kSums; ++u) {
#if defined(__x86_64__) && !defined(NEARFAR_EMULATE_AVX512)
      asm volatile("" : "+v"(a), "+v"(b));  // or one product serves every sum
#elif defined(__aarch64__)
      asm volatile("" : "+w"(a), "+w"(b));
#endif
      if constexpr (QUADS) {
        sum[u] = multiply_quads(sum[u], a, b);
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

/// Whether products of quads are faster here than float32 ones by more than screening costs: measured once, since that
/// differs between CPUs of one instruction set. It decides time, not results.
inline bool screening_pays() {
  static const bool pays = [] {
    constexpr double kGain = 1.5;
    double quads = 1e9, singles = 1e9;
    for (int repeat = 0; repeat < 5; ++repeat) {
      quads = std::fmin(quads, product_seconds<true>());
      singles = std::fmin(singles, product_seconds<false>());
    }
    return 4 * singles > kGain * quads;  // a quad is four multiply-adds
  }();
  return pays;
}

/// Whether a search among columns of d dimensions is screened.
inline bool screens(Screening mode, int64_t columns, int64_t d, int64_t k) {
  constexpr int64_t kLeastDims = 32, kMostDims = 1 << 18;  // fewer leave little to save; of more, sums may overflow
  // Fewer columns do not pay for rounding a row, or where there are k best, for what a row lists and scores in full.
  const int64_t least = k == 1 ? 32 : k * (d > 150 ? 2 * d : d > 100 ? 300 : 350);
  if (d < kLeastDims || d > kMostDims || columns > std::numeric_limits<int32_t>::max()) return false;
  return mode == Screening::always || (mode == Screening::automatic && columns >= least && screening_pays());
}

class Screen {
  using T = float;
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr int kTileVectors = (P::MR + kLanes<T> - 1) / kLanes<T>;

 public:
  Screen(const Operands<T>& operands, int threads)
      : o_(operands),
        steps_(ceil_div(o_.d, 4)),
        block_steps_(kWideSums ? steps_ : kBlockSteps),
        blocks_(ceil_div(steps_, block_steps_)),
        rounding_(static_cast<T>(2 * o_.d + 16) * 0x1p-24f),
        safe_(1.0001f + static_cast<T>(o_.d) * 0x1p-24f),
        gain_(o_.distance() ? 2 : 1),
        runs_(ceil_div(o_.chunks.tiles, kRunColumns / P::MR)),
        tiles_each_(runs_ ? ceil_div(o_.chunks.tiles, runs_) : 0),
        tiles_(o_.chunks.tiles * steps_ * P::MR + kTileVectors * kLanes<T>),
        starts_(o_.chunks.tiles * blocks_ * P::MR),
        factor_(o_.chunks.tiles * P::MR),
        square_(o_.chunks.tiles * P::MR),
        norm_(o_.chunks.tiles * P::MR) {
    Buffer<T> most(2 * o_.chunks.count);
    parallel_for(o_.chunks.count, threads, [&](int64_t chunk, int) {
      Buffer<T> rows(room(P::MR));
      T norm = 0, part = 0;
      for (int64_t t = o_.chunks.tile_begin(chunk); t < o_.chunks.tile_end(chunk); ++t)
        pack_tile(t, rows.get(), norm, part);
      most[2 * chunk] = norm, most[2 * chunk + 1] = part;
    });
    for (int64_t chunk = 0; chunk < o_.chunks.count; ++chunk) {
      most_norm_ = most[2 * chunk] > most_norm_ ? most[2 * chunk] : most_norm_;
      most_part_ = most[2 * chunk + 1] > most_part_ ? most[2 * chunk + 1] : most_part_;
    }
  }

  /// The panels of a strip of x, rounded; per lane s, |x|^2, and what a rank may differ by from the exact one and from
  /// the engine's: `reach` times the norm of the column, and `slack`.
  struct Strip {
    Buffer<int32_t> quads;
    alignas(64) T scale[P::kStripRows], square[P::kStripRows], reach[P::kStripRows], slack[P::kStripRows];
    bool covered[P::kPanels];  // whether that holds: not for rows of infinite numbers, NaN, and of extreme norms
  };
  /// Columns go by in runs, whose ranks fit in L1.
  int64_t runs() const { return runs_; }
  int64_t run_begin(int64_t run) const { return run * tiles_each_ * P::MR; }
  int64_t run_end(int64_t run) const {
    const int64_t end = run_begin(run + 1);
    return end < o_.chunks.columns ? end : o_.chunks.columns;
  }

  /// Ranks of the columns of a run for a panel, and which of them matter.
  struct Ranks {
    struct Found {
      int32_t column;
      unsigned lanes;
    };
    Buffer<T> upper;  // [column][NR]
    Buffer<Found> found;

    /// Finds the columns that reach the bar of a lane; how many.
    int64_t find(int64_t columns, const T* bars) const {
      Vec<T> bar[P::kVectors];
      for (int v = 0; v < P::kVectors; ++v) bar[v] = load(bars + v * kLanes<T>);
      int64_t count = 0;
      for (int64_t c = 0; c < columns; ++c) {
        unsigned lanes = 0;
        for (int v = 0; v < P::kVectors; ++v)
          lanes |= lanes_set(load(upper.get() + c * NR + v * kLanes<T>) >= bar[v]) << (v * kLanes<T>);
        found[count] = {static_cast<int32_t>(c), lanes};
        count += lanes != 0;  // no branch: nothing could foresee it
      }
      return count;
    }
  };

  /// Room for W rows of `read_rows`, and a vector more.
  int64_t room(int64_t w) const { return w * padded<T>(o_.d) + kLanes<T>; }
  void open(Strip& strip, Ranks& ranks) const {
    strip.quads = Buffer<int32_t>(P::kPanels * steps_ * NR);
    ranks.upper = Buffer<T>(tiles_each_ * P::MR * NR);
    ranks.found = Buffer<Ranks::Found>(tiles_each_ * P::MR + 1);
  }

  /// Rounds panel q of a strip from rows as `read_rows` leaves them.
  void pack_panel(const T* rows, int64_t q, Strip& strip) const {
    const int64_t at = q * NR;
    T norm[NR], lost[NR];
    round<NR, true>(rows, strip.quads.get() + at * steps_, strip.scale + at, strip.square + at, norm, lost);
    strip.covered[q] = covers_columns();
    for (int r = 0; r < NR; ++r) {
      strip.covered[q] &= covers(norm[r]);
      const T own = norm[r] + lost[r];
      strip.reach[at + r] = gain_ * safe_ * (lost[r] + own * most_part_ + own * rounding_);
      strip.slack[at + r] = (norm[r] * norm[r] + most_norm_ * most_norm_) * rounding_ + 0x1p-120f;
    }
  }

  /// The highest rank that each column of a run can have; ranks are 2 <x, y> - |y|^2 for distances, else <x, y>.
  /// `LOWEST` raises lowest[NR] to the lowest that the best column can have.
  template <bool LOWEST>
  void block(int64_t run, const Strip& strip, int64_t q, const Ranks& ranks, T* lowest) const {
    // Deeper rows have sums that are kept aside; one that decides inside would take longer for all.
    if (blocks_ == 1) return block_of<LOWEST, 1>(run, strip, q, ranks, lowest);
    block_of<LOWEST, 2>(run, strip, q, ranks, lowest);
  }

  /// The lowest rank of a column from the highest.
  T lower(T upper, const Strip& strip, int64_t lane, int64_t j) const {
    return upper - 2 * strip.reach[lane] * norm_[j];
  }

  /// Screening that decides too little is given up: whoever screens says how many of all pairs had to be measured all
  /// the same. Answers do not depend on it.
  bool helps() const {
    return covers_columns() &&
           20 * __atomic_load_n(&open_, __ATOMIC_RELAXED) <= __atomic_load_n(&seen_, __ATOMIC_RELAXED);
  }
  void report(int64_t open, int64_t seen) const {
    __atomic_fetch_add(&open_, open, __ATOMIC_RELAXED);
    __atomic_fetch_add(&seen_, seen, __ATOMIC_RELAXED);
  }

 private:
  static constexpr int64_t kBlockSteps = 16, kRunColumns = 288;
  // Of a row of x integers up to 63, and 64 more so that none is negative; of y up to 127. Half a step goes into one
  // sum of 16 bits: over a block norms stay below 135 and 242, for which they are rounded from numbers a little
  // smaller.
  static constexpr T kMagic = 0x1.8p23f;
  static constexpr T kLeastNorm = 0x1p-30f, kMostNorm = 0x1p60f;  // squares of what is lost are normal numbers

  static bool covers(T norm) { return norm == 0 || (norm >= kLeastNorm && norm < kMostNorm); }
  bool covers_columns() const { return most_norm_ < kMostNorm; }

  NEARFAR_INLINE static Quads iload(const int32_t* from) {
    Quads v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }

  NEARFAR_INLINE void multiply(int64_t k, int64_t end, const int32_t* tile, const int32_t* quads, const int32_t* start,
                               Quads (&sum)[P::MR][P::kVectors]) const {
#pragma GCC unroll 12
    for (int r = 0; r < P::MR; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) sum[r][v] = isplat<T>(start[r]);
    for (; k < end; ++k) {
      Quads own[P::kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < P::kVectors; ++v) own[v] = iload(quads + k * NR + v * kLanes<T>);
#pragma GCC unroll 12
      for (int r = 0; r < P::MR; ++r) {
        const Quads other = isplat<T>(tile[k * P::MR + r]);
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) sum[r][v] = multiply_quads(sum[r][v], own[v], other);
      }
    }
  }

  /// BLOCKS: 1, or 2 for any number more. Not inlined, or what is around it takes registers from the sums.
  template <bool LOWEST, int BLOCKS>
  __attribute__((noinline)) void block_of(int64_t run, const Strip& strip, int64_t q, const Ranks& ranks,
                                          T* lowest) const {
    const int32_t* quads = strip.quads.get() + q * steps_ * NR;
    alignas(64) int32_t before[BLOCKS > 1 ? P::MR * NR : 1] = {};
    Vec<T> least[P::kVectors] = {};
    if (LOWEST)
      for (int v = 0; v < P::kVectors; ++v) least[v] = load(lowest + v * kLanes<T>);
    T* upper = ranks.upper.get();
    const int64_t end = (run + 1) * tiles_each_ < o_.chunks.tiles ? (run + 1) * tiles_each_ : o_.chunks.tiles;
    for (int64_t t = run * tiles_each_; t < end; ++t, upper += P::MR * NR) {
      const int32_t* tile = tiles_.get() + t * steps_ * P::MR;
      const int32_t* start = starts_.get() + t * blocks_ * P::MR;
      Quads sum[P::MR][P::kVectors];
      for (int64_t b = 0; BLOCKS > 1 && b + 1 < blocks_; ++b) {
        multiply(b * block_steps_, (b + 1) * block_steps_, tile, quads, start + b * P::MR, sum);
#pragma GCC unroll 12
        for (int r = 0; r < P::MR; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < P::kVectors; ++v) {
            int32_t* place = before + r * NR + v * kLanes<T>;
            const Quads total = widened(sum[r][v]) + (b ? iload(place) : Quads{});
            std::memcpy(place, &total, sizeof total);
          }
      }
      const int64_t last = BLOCKS > 1 ? blocks_ - 1 : 0;
      multiply(last * block_steps_, steps_, tile, quads, start + last * P::MR, sum);
#pragma GCC unroll 12
      for (int r = 0; r < P::MR; ++r) {
        const int64_t j = t * P::MR + r;
        const Vec<T> factor = splat<T>(factor_[j]), square = splat<T>(square_[j]), norm = splat<T>(norm_[j]);
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v) {
          const int64_t at = q * NR + v * kLanes<T>;
          Quads total = widened(sum[r][v]);
          if (BLOCKS > 1) total += iload(before + r * NR + v * kLanes<T>);
          // One factor after the other: their product may be too small.
          const Vec<T> rank = to_float(total) * load(strip.scale + at) * factor - square,
                       reach = load(strip.reach + at);
          store(upper + r * NR + v * kLanes<T>, rank + reach * norm);
          if (LOWEST) least[v] = vmax(rank - reach * norm, least[v]);
        }
      }
    }
    if (LOWEST)
      for (int v = 0; v < P::kVectors; ++v) store(lowest + v * kLanes<T>, least[v]);
  }

  void pack_tile(int64_t t, T* rows, T& most_norm, T& most_part) {
    T scale[P::MR], square[P::MR], norm[P::MR], lost[P::MR];
    int32_t* tile = tiles_.get() + t * steps_ * P::MR;
    read_rows<P::MR>(o_.y, t * P::MR, rows);
    round<P::MR, false>(rows, tile, scale, square, norm, lost);
    for (int r = 0; r < P::MR; ++r) {
      const int64_t j = t * P::MR + r;
      const bool is_column = j < o_.chunks.columns;  // others rank below every column
      factor_[j] = gain_ * scale[r];
      square_[j] = is_column ? (o_.distance() ? *o_.squares(j) : T(0)) : std::numeric_limits<T>::infinity();
      norm_[j] = norm[r];
      if (!covers(norm[r])) norm[r] = std::numeric_limits<T>::infinity();
      most_norm = norm[r] > most_norm ? norm[r] : most_norm;
      const T part = norm[r] > 0 ? lost[r] / norm[r] : T(0);
      most_part = part > most_part ? part : most_part;
    }
    // What the 64 in every number of x adds to a sum is taken away before.
    for (int64_t b = 0; b < blocks_; ++b)
      for (int v = 0; v < kTileVectors; ++v) {
        Quads sum = {};
        for (int64_t k = b * block_steps_; k < (b + 1) * block_steps_ && k < steps_; ++k)
          sum = multiply_quads(sum, isplat<T>(0x40404040), iload(tile + k * P::MR + v * kLanes<T>));
        for (int u = 0; u < kLanes<T> && v * kLanes<T> + u < P::MR; ++u) {
          const int32_t own = sum[u];
          starts_[(t * blocks_ + b) * P::MR + v * kLanes<T> + u] =
              kWideSums ? -own
                        : (-own & 0xffff) | static_cast<int32_t>(-static_cast<uint32_t>(own >> 16 & 0xffff) << 16);
        }
      }
  }

  /// W rows, rounded and side by side: quads[step][W], and s, |x|^2, |x| and |x - x'| of each; a zero row has s = 0.
  /// Which coordinates make a quad does not matter as long as it is the same for x and y: a lane of four vectors one
  /// behind the other, or, of a last part of r coordinates, of the quarters of it.
  template <int W, bool ROWS>
  __attribute__((noinline)) void round(const T* rows, int32_t* quads, T* scales, T* squares, T* norms, T* losts) const {
    constexpr int L = kLanes<T>;
    constexpr T kEntry = ROWS ? 63 : 127, kNorm = ROWS ? 132 : 239, kShift = ROWS ? kMagic + 64 : kMagic;
    const int64_t stride = padded<T>(o_.d);
    const auto quarter_of = [&](int64_t step) { return steps_ - step < L ? steps_ - step : L; };
    // Vector h of the four that begin at a step.
    const auto part = [&](int r, int64_t step, int64_t quarter, int h) {
      const Vec<T> own = load(rows + r * stride + 4 * step + h * quarter);
      return quarter == L ? own : select(iota<T>() < isplat<T>(static_cast<int32_t>(quarter)), own, Vec<T>{});
    };
    T inverses[W];
    Vec<T> rest[W];
    for (int r = 0; r < W; ++r) {
      T square = 0, widest = 0;
      Vec<T> most = {};
      for (int64_t b = 0; b < blocks_; ++b) {
        Vec<T> halves[2] = {};
        for (int64_t step = b * block_steps_; step < (b + 1) * block_steps_ && step < steps_; step += L) {
          const int64_t quarter = quarter_of(step);
#pragma GCC unroll 4
          for (int h = 0; h < 4; ++h) {
            const Vec<T> own = part(r, step, quarter, h);
            halves[h / 2] += own * own;
            most = vmax(absolute(own), most);
          }
        }
        const T low = hsum<T>(halves[0]), high = hsum<T>(halves[1]), wider = low > high ? low : high;
        square += low + high;
        widest = wider > widest ? wider : widest;
      }
      rest[r] = Vec<T>{};
      squares[r] = square;
      const T entry = hmax<T>(most);
      norms[r] = entry > 0 || square != square ? std::sqrt(square) * safe_ + 0x1p-60f : T(0);
      const T by_norm = kWideSums ? T(0) : std::sqrt(widest) * (safe_ / kNorm), by_entry = entry * (1 / kEntry);
      scales[r] = norms[r] < kLeastNorm ? T(0) : by_norm > by_entry ? by_norm : by_entry;
      inverses[r] = norms[r] < kLeastNorm ? T(0) : 1 / scales[r];
    }
    interleave<W, T>(steps_, quads, [&](int r, int64_t step) {
      const int64_t quarter = quarter_of(step);
      Quads four[4];
#pragma GCC unroll 4
      for (int h = 0; h < 4; ++h) {
        const Vec<T> own = part(r, step, quarter, h), shifted = own * inverses[r] + kShift;
        const Vec<T> difference = own - (shifted - kShift) * scales[r];
        four[h] = (Quads)shifted & 0xff;
        rest[r] += difference * difference;
      }
      return (Vec<T>)(four[0] | four[1] << 8 | four[2] << 16 | four[3] << 24);
    });
    for (int r = 0; r < W; ++r) losts[r] = std::sqrt(hsum<T>(rest[r])) * safe_ + norms[r] * 0x1p-22f;
  }

  const Operands<T>& o_;
  const int64_t steps_, block_steps_, blocks_;
  const T rounding_, safe_, gain_;
  const int64_t runs_, tiles_each_;
  Buffer<int32_t> tiles_, starts_;
  Buffer<T> factor_, square_, norm_;
  T most_norm_ = 0, most_part_ = 0;
  // As if some strips had been seen and decided, or the first rows would decide alone.
  mutable int64_t open_ = 0, seen_ = 16 * P::kStripRows * o_.chunks.columns;
};

/// Columns that the rows of a strip may still want, each with the highest rank that it can have.
class Shortlist {
  using T = float;

 public:
  struct Candidate {
    T upper;
    int32_t column;
  };

  void open(int64_t rows, int64_t width) {
    width_ = width;
    list_ = Buffer<Candidate>(rows * width);
    count_ = Buffer<int64_t>(rows);
    clear(rows);
  }
  void clear(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) count_[i] = 0;
  }

  /// False where a row has too many.
  bool add(int64_t row, Candidate candidate, T bar) {
    if (count_[row] == width_) {
      keep(row, bar);
      if (count_[row] > width_ - width_ / 4) return false;
    }
    list_[row * width_ + count_[row]++] = candidate;
    return true;
  }

  /// Drops columns below the bar.
  void keep(int64_t row, T bar) {
    Candidate* list = list_.get() + row * width_;
    int64_t count = 0;
    for (int64_t c = 0; c < count_[row]; ++c)
      if (list[c].upper >= bar) list[count++] = list[c];
    count_[row] = count;
  }

  int64_t count(int64_t row) const { return count_[row]; }
  /// The column that can have the highest rank.
  int64_t highest(int64_t row) const {
    const Candidate* list = list_.get() + row * width_;
    int64_t best = 0;
    for (int64_t c = 1; c < count_[row]; ++c)
      if (list[c].upper > list[best].upper) best = c;
    return list[best].column;
  }
  int64_t column(int64_t row, int64_t c) const { return list_[row * width_ + c].column; }

 private:
  int64_t width_ = 0;
  Buffer<Candidate> list_;
  Buffer<int64_t> count_;
};

}  // namespace
}  // namespace nearfar
