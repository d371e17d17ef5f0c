// Rows on the device: read from any dtype and strides, packed once for the engine.
#pragma once

#include "cpu/ops.hpp"
#include "cuda/blocked.hpp"
#include "cuda/context.hpp"
#include "cuda/lanes.hpp"

namespace nearfar {
inline namespace device {

/// Squared distances come from differences up to this depth, and for pairs closer than kNear (|x|^2 + |y|^2).
constexpr int64_t kDirectDims = 16;
template <class T>
constexpr T kNear = T(1) / 512;
/// Of rows in two pieces of tf32: what three products lose has one sign where rows are near, 2^-24.6 of |x|^2 by the
/// fourth and about 2^-23 by sums that are cut off; plain float32 sums lose as much, but with both signs.
constexpr float kNearSplit = 4 * kNear<float>;

constexpr int64_t kPadRows = 128;  // every tile height divides it
constexpr int64_t kPadDepth = 64;  // every tile depth divides it

/// Rows as given, converted to T; divided by their norm where `inverse` is there.
template <class T>
struct Source {
  Rows rows;
  const T* inverse = nullptr;

  NEARFAR_DEVICE bool wide() const {
    const int64_t others = (rows.dtype == DType::f64 ? 2 : rows.dtype == DType::f32 ? 4 : 8) - 1;
    return rows.col_stride == 1 && !(rows.d & others) && !(rows.row_stride & others) && aligned(rows.data);
  }
  NEARFAR_DEVICE bool wide_as(const Source& other) const {
    return rows.dtype == other.rows.dtype && wide() && other.wide();
  }
  /// Numbers k ... of row i, as they lie in memory; what they are.
  template <class E>
  NEARFAR_DEVICE Vector<uint32_t> hold(Wide<E> how, int64_t i, int64_t k) const {
    return how.load(static_cast<const E*>(rows.data) + i * rows.row_stride + k);
  }
  NEARFAR_DEVICE T hold(Single<T>, int64_t i, int64_t k) const { return raw(i, k); }
  template <class E>
  NEARFAR_DEVICE static T value(Wide<E> how, const Vector<uint32_t>& held, int e) {
    return static_cast<T>(widen(how.get(held, e)));
  }
  NEARFAR_DEVICE static T value(Single<T>, T held, int) { return held; }

  NEARFAR_DEVICE T raw(int64_t i, int64_t k) const {
    const int64_t at = i * rows.row_stride + k * rows.col_stride;
    switch (rows.dtype) {
      case DType::f16:
        return static_cast<T>(widen(static_cast<const F16*>(rows.data)[at]));
      case DType::bf16:
        return static_cast<T>(widen(static_cast<const BF16*>(rows.data)[at]));
      case DType::f64:
        return static_cast<T>(static_cast<const double*>(rows.data)[at]);
      default:
        return static_cast<T>(static_cast<const float*>(rows.data)[at]);
    }
  }
  NEARFAR_DEVICE T scale(int64_t i) const { return inverse ? inverse[i] : T(1); }
  NEARFAR_DEVICE T get(int64_t i, int64_t k) const { return inverse ? raw(i, k) * inverse[i] : raw(i, k); }
};

/// |x_i - y_j|^2 from the rows as given, by one thread.
template <class T>
NEARFAR_DEVICE T direct_distance(const Source<T>& x, const Source<T>& y, int64_t i, int64_t j) {
  T sum = 0;
  for (int64_t k = 0; k < x.rows.d; ++k) {
    const T difference = x.get(i, k) - y.get(j, k);
    sum += difference * difference;
  }
  return sum;
}

/// f(number of row i of x, of row j of y) for all of them by a warp, `how` being what `choose_way` says of both.
template <class Way, class T, class F>
NEARFAR_DEVICE void for_both(Way how, const Source<T>& x, int64_t i, const Source<T>& y, int64_t j, F f) {
  const T of_x = x.scale(i), of_y = y.scale(j);
  for_row(how, x.rows.d, [&](int64_t k) {
    const auto u = x.hold(how, i, k), v = y.hold(how, j, k);
    NEARFAR_UNROLL
    for (int e = 0; e < Way::kWide; ++e) f(x.value(how, u, e) * of_x, y.value(how, v, e) * of_y);
  });
}

/// The inner product of two rows as given, by a warp; every lane has it.
template <class Way, class T>
NEARFAR_DEVICE double warp_dot(Way how, const Source<T>& x, int64_t i, const Source<T>& y, int64_t j) {
  double sum = 0;
  for_both(how, x, i, y, j, [&](T u, T v) { sum += static_cast<double>(u) * static_cast<double>(v); });
  return cuda::warp_sum(sum);
}
template <class T>
NEARFAR_DEVICE double warp_dot(const Source<T>& x, int64_t i, const Source<T>& y, int64_t j) {
  double sum = 0;
  choose_way<T>(y.wide_as(x), x.rows.dtype, [&](auto how) { sum = warp_dot(how, x, i, y, j); });
  return sum;
}

// ---- inverse norms
// ---------------------------------------------------------------------------------------------------

/// A warp a row. The norm of float64 rows is taken of the row over its largest entry, so that squares stay in range;
/// those of float32 do in double. A zero row stays zero, and so does one of denormal numbers, whose inverse norm is
/// none.
template <class T>
struct InverseNorms {
  Source<T> source;
  T* inverse;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= source.rows.n) return;
    choose_way<T>(source.wide(), source.rows.dtype, [&](auto how) {
      double most = 1, sum = 0;
      if (sizeof(T) == 8) {
        most = 0;
        for_values(how, i, [&](double value) { most = largest(most, fabs(value)); });
        for (int mask = cuda::kWarp / 2; mask > 0; mask /= 2) most = largest(most, cuda::shuffle_xor(most, mask));
      }
      const double unit = most > 0 ? most : 1;
      for_values(how, i, [&](double value) {
        if (sizeof(T) == 8) value /= unit;
        sum += value * value;
      });
      const double norm = most * sqrt(cuda::warp_sum(sum));
      const T own = static_cast<T>(1 / norm);
      if (cuda::lane_index() == 0) inverse[i] = own == infinity<T>() || most == infinity<double>() ? T(0) : own;
    });
  }
  template <class Way, class F>
  NEARFAR_DEVICE void for_values(Way how, int64_t i, F f) const {
    for_row(how, source.rows.d, [&](int64_t k) {
      const auto held = source.hold(how, i, k);
      NEARFAR_UNROLL
      for (int e = 0; e < Way::kWide; ++e) f(static_cast<double>(source.value(how, held, e)));
    });
  }
};

inline bool same_rows(const Rows& a, const Rows& b) {
  return a.data == b.data && a.n == b.n && a.d == b.d && a.row_stride == b.row_stride && a.col_stride == b.col_stride;
}

template <class T>
Source<T> source_of(cuda::Context& c, const Rows& rows, bool normalize) {
  Source<T> source{rows};
  if (!normalize || rows.n == 0) return source;
  T* inverse = c.take<T>(rows.n);
  c.launch_warps(rows.n, InverseNorms<T>{source, inverse});
  source.inverse = inverse;
  return source;
}

// ---- packed rows
// -----------------------------------------------------------------------------------------------------

/// Rows ready for the engine: contiguous, zero up to a whole tile in both directions (and one row more, because a tile
/// may read past the depth of the last row). Row i is `factor[i] * data[i]`: 16-bit rows are packed exactly, times a
/// power of two, and their norm is left to who uses the product (blocked rows always have a factor, perhaps 1). float32
/// and float64 rows are normalised or centred here.
template <class T, class E>
struct Packed {
  E* data = nullptr;
  T* factor = nullptr;
  T* squares = nullptr;  // squared norms of the rows, for distances and ranks
  T* lost = nullptr;     // of centred 16-bit rows, the norm of what they lose by it; behind all rows, the largest
  int64_t n = 0, d = 0, padded = 0, pitch = 0;
  bool blocked = false;  // as blocked.hpp says, 16-bit rows on Hopper
  SplitBlocked split{};  // the same rows in two pieces, where scores take them: float32 on Hopper

  NEARFAR_DEVICE E* at(int64_t i, int64_t k) const {
    if constexpr (sizeof(E) == 2)
      if (blocked) return reinterpret_cast<E*>(blocks().at(i, k));
    return data + i * pitch + k;
  }
  /// From row block `down` on.
  NEARFAR_HOST_DEVICE Blocked blocks(int64_t down = 0) const {
    return {reinterpret_cast<uint16_t*>(data) + down * Blocked::kRows * pitch, pitch / Blocked::kColumns};
  }
  NEARFAR_HOST_DEVICE SplitBlocked splits(int64_t down) const {
    return {split.data + down * split.across * split.kBlock, split.across};
  }
};

template <class T, class E>
struct Pack {
  Source<T> source;
  const T* center;
  Packed<T, E> out;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i > out.padded || (i == out.padded && out.blocked)) return;
    const bool inside = i < out.n;
    constexpr bool kExact = sizeof(E) == 2;
    T multiply = inside && !kExact ? source.scale(i) : T(1), factor = 1;
    if (kExact && out.factor) {
      const T inverse = inside ? source.scale(i) : T(0);
      T power = 1;
      if (source.inverse && inverse > 0 && inverse < infinity<T>()) {
        const int order = ilogb(inverse) + 8;  // away from the subnormal numbers of float16
        power = ldexp(T(1), order < 127 ? order : 127);
      }
      multiply = power, factor = inverse / power;
      if (cuda::lane_index() == 0 && i < out.padded) out.factor[i] = factor;
    }
    double sum = 0, lost = 0;
    // 16-bit rows are packed as what they are.
    choose_way<T, std::conditional_t<kExact, E, void>>(source.wide(), source.rows.dtype, [&](auto how) {
      using Way = decltype(how);
      for_row(how, out.pitch, [&](int64_t k) {
        const bool here = inside && k < out.d;
        const auto held = here ? source.hold(how, i, k) : typename Way::Held{};
        Piece<T, Way::kWide> own, shift{};
        if (center && here) shift = load_piece<Way::kWide>(center + k);
        NEARFAR_UNROLL
        for (int e = 0; e < Way::kWide; ++e) {
          own[e] = source.value(how, held, e) * multiply - shift[e];
          if (out.squares) sum += static_cast<double>(own[e]) * static_cast<double>(own[e]);
          if constexpr (kExact)
            if (out.lost) lost += lost_of(own[e]);
        }
        store_piece(out.at(i, k), own);
        if constexpr (std::is_same_v<E, float>)
          if (out.split.data && i < out.padded && k < out.split.across * out.split.kColumns) put_split(i, k, own);
      });
    });
    if (!out.squares || i >= out.padded) return;
    sum = cuda::warp_sum(sum);
    if (out.lost) lost = cuda::warp_sum(lost);
    if (cuda::lane_index() != 0) return;
    out.squares[i] = static_cast<T>(sum * static_cast<double>(factor) * static_cast<double>(factor));
    if constexpr (kExact) {
      if (!out.lost) return;
      out.lost[i] = static_cast<T>(sqrt(lost));
      // Looked at first: a million rows that change one number would wait for each other.
      if (out.lost[i] > out.lost[out.padded]) cuda::atomic_max(out.lost + out.padded, out.lost[i]);
    }
  }
  /// The square of what a number loses that is to be packed as E; it stays finite.
  NEARFAR_DEVICE static double lost_of(T& own) {
    constexpr T kMost = std::is_same_v<E, F16> ? T(65504) : T(3.3895314e38);
    if (!(absolute(own) < infinity<T>())) return 0;
    const T kept = static_cast<T>(widen(narrow<E>(smallest(largest(own, -kMost), kMost))));
    const double lost = static_cast<double>(own) - static_cast<double>(kept);
    own = kept;
    return lost * lost;
  }
  /// What is not finite, or would be if it were rounded, is in the first piece alone.
  template <int N>
  NEARFAR_DEVICE void put_split(int64_t i, int64_t k, const Piece<float, N>& own) const {
    Piece<float, N> first, second;
    NEARFAR_UNROLL
    for (int e = 0; e < N; ++e) {
      const float rounded = cuda::round_tf32(own[e]);
      const bool finite = absolute(rounded) < infinity<float>();
      first[e] = finite ? rounded : own[e];
      second[e] = finite ? cuda::round_tf32(own[e] - rounded) : 0.0f;
    }
    // Neighbours of a row lie side by side as long as a vector reaches.
    constexpr int kSize = N < SplitBlocked::kWide ? N : SplitBlocked::kWide;
    NEARFAR_UNROLL
    for (int e = 0; e < N; e += kSize) {
      float* place = out.split.at(i, k + e);
      store_piece(place, part_of<kSize>(first, e));
      store_piece(place + out.split.kPiece, part_of<kSize>(second, e));
    }
  }
};

template <class T>
struct Fill {
  T* out;
  int64_t count;
  T value;
  NEARFAR_DEVICE void operator()() const {
    const int64_t k = cuda::global_thread();
    if (k < count) out[k] = value;
  }
};

template <class E, class T>
Packed<T, E> pack(cuda::Context& c, const Source<T>& source, const T* center, bool squares, bool blocked = false,
                  bool split = false) {
  Packed<T, E> out;
  out.n = source.rows.n;
  out.d = source.rows.d;
  out.padded = round_up(out.n, kPadRows);
  out.blocked = blocked;
  out.pitch = round_up(out.d, out.blocked ? 2 * Blocked::kColumns : kPadDepth);
  out.data = c.take<E>((out.padded + 1) * out.pitch);
  if (sizeof(E) == 2 && (source.inverse || out.blocked)) out.factor = c.take<T>(out.padded);
  if (squares) out.squares = c.take<T>(out.padded);
  if (sizeof(E) == 2 && center) {
    out.lost = c.take<T>(out.padded + 1);
    c.launch_threads(1, Fill<T>{out.lost + out.padded, 1, T(0)});
  }
  if (split) {
    out.split.across = ceil_div(out.d, out.split.kColumns);
    out.split.data = c.take<float>(out.padded * out.split.across * out.split.kColumns * out.split.kPieces);
  }
  c.launch_warps(out.padded + 1, Pack<T, E>{source, center, out});
  return out;
}

/// About the mean of some evenly spaced rows, over finite entries, each coordinate rounded to half the binary order of
/// its spread: subtracting it is then exact for most points, and points with integer coordinates keep integer ones, so
/// ties stay ties. Any common point is a valid centre: coordinates nearer to zero than `far` times their spread may
/// stay where they are. A block takes 32 coordinates.
template <class T>
struct Center {
  static constexpr int64_t kSamples = 256;
  Source<T> source;
  T* center;
  double far;

  NEARFAR_DEVICE void operator()() const {
    NEARFAR_SHARED double sums[cuda::kWarps][cuda::kWarp], counts[cuda::kWarps][cuda::kWarp];
    const int lane = cuda::lane_index(), warp = cuda::warp_index();
    const int64_t k = cuda::block_index() * cuda::kWarp + lane, n = source.rows.n;
    const int64_t step = n > kSamples ? n / kSamples : 1;
    double mean = 0, spread = 0;
    for (int pass = 0; pass < 2; ++pass) {
      double sum = 0, count = 0;
      for (int64_t i = warp * step; i < n && k < source.rows.d; i += cuda::kWarps * step) {
        const double value = static_cast<double>(source.get(i, k));
        if (!(fabs(value) < infinity<double>())) continue;
        sum += pass == 0 ? value : (value - mean) * (value - mean);
        count += 1;
      }
      sums[warp][lane] = sum;
      counts[warp][lane] = count;
      cuda::sync_block();
      sum = count = 0;
      for (int w = 0; w < cuda::kWarps; ++w) sum += sums[w][lane], count += counts[w][lane];
      cuda::sync_block();
      if (pass == 0) {
        mean = count > 0 ? sum / count : 0;
      } else {
        spread = count > 0 ? sqrt(sum / count) : 0;
      }
    }
    if (warp != 0 || k >= source.rows.d) return;
    if (fabs(mean) < far * spread) {
      mean = 0;
    } else if (spread > 0) {
      const double grid = ldexp(1.0, ilogb(spread) - 1);
      mean = nearbyint(mean / grid) * grid;
    }
    center[k] = static_cast<T>(mean);
  }
};

template <class T>
const T* center_of(cuda::Context& c, const Source<T>& source, double far = 0) {
  T* center = c.take<T>(source.rows.d);
  c.launch(ceil_div(source.rows.d, cuda::kWarp), Center<T>{source, center, far});
  return center;
}

}  // namespace device
}  // namespace nearfar
