// Rows on the device: read from any dtype and strides, packed once for the engine, and the last step of a gradient.
#pragma once

#include "cpu/ops.hpp"
#include "cuda/blocked.hpp"
#include "cuda/context.hpp"
#include "cuda/number.hpp"

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

/// The inner product of two rows as given, by a warp; every lane has it.
template <class T>
NEARFAR_DEVICE double warp_dot(const Source<T>& x, int64_t i, const Source<T>& y, int64_t j) {
  double sum = 0;
  for (int64_t k = cuda::lane_index(); k < x.rows.d; k += cuda::kWarp)
    sum += static_cast<double>(x.get(i, k)) * static_cast<double>(y.get(j, k));
  return cuda::warp_sum(sum);
}

// ---- inverse norms
// ---------------------------------------------------------------------------------------------------

/// A warp a row. The norm of float64 rows is taken of the row over its largest entry, so that squares stay in range;
/// those of float32 do in double. A zero row stays zero.
template <class T>
struct InverseNorms {
  Source<T> source;
  T* inverse;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= source.rows.n) return;
    double most = 1, sum = 0;
    if (sizeof(T) == 8) {
      most = 0;
      for (int64_t k = cuda::lane_index(); k < source.rows.d; k += cuda::kWarp)
        most = largest(most, fabs(static_cast<double>(source.raw(i, k))));
      for (int mask = cuda::kWarp / 2; mask > 0; mask /= 2) most = largest(most, cuda::shuffle_xor(most, mask));
    }
    NEARFAR_UNROLL_4
    for (int64_t k = cuda::lane_index(); k < source.rows.d; k += cuda::kWarp) {
      const double value = static_cast<double>(source.raw(i, k)) / (most > 0 ? most : 1);
      sum += value * value;
    }
    const double norm = most * sqrt(cuda::warp_sum(sum));
    if (cuda::lane_index() == 0) inverse[i] = norm == 0 || most == infinity<double>() ? T(0) : static_cast<T>(1 / norm);
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
  T* squares = nullptr;  // squared norms of the packed rows, for distances
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
    T multiply = inside && !kExact ? source.scale(i) : T(1);
    if (kExact && out.factor) {
      const T inverse = inside ? source.scale(i) : T(0);
      T power = 1;
      if (source.inverse && inverse > 0 && inverse < infinity<T>())
        power = ldexp(T(1), ilogb(inverse) + 8);  // away from the subnormal numbers of float16
      multiply = power;
      if (cuda::lane_index() == 0 && i < out.padded) out.factor[i] = inverse / power;
    }
    double sum = 0;
    for (int64_t k = cuda::lane_index(); k < out.pitch; k += cuda::kWarp) {
      T value = 0;
      if (inside && k < out.d) value = source.raw(i, k) * multiply - (center ? center[k] : T(0));
      *out.at(i, k) = narrow<E>(value);
      if constexpr (std::is_same_v<E, float>)
        if (out.split.data && i < out.padded && k < out.split.across * out.split.kColumns) put_split(i, k, value);
      sum += static_cast<double>(value) * static_cast<double>(value);
    }
    if (!out.squares || i >= out.padded) return;
    sum = cuda::warp_sum(sum);
    if (cuda::lane_index() == 0) out.squares[i] = static_cast<T>(sum);
  }
  /// What is not finite, or would be if it were rounded, is in the first piece alone.
  NEARFAR_DEVICE void put_split(int64_t i, int64_t k, float value) const {
    const float rounded = cuda::round_tf32(value);
    const bool finite = absolute(rounded) < infinity<float>();
    float* place = out.split.at(i, k);
    place[0] = finite ? rounded : value;
    place[out.split.kPiece] = finite ? cuda::round_tf32(value - rounded) : 0.0f;
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
  if (split) {
    out.split.across = ceil_div(out.d, out.split.kColumns);
    out.split.data = c.take<float>(out.padded * out.split.across * out.split.kColumns * out.split.kPieces);
  }
  c.launch_warps(out.padded + 1, Pack<T, E>{source, center, out});
  return out;
}

/// About the mean of some evenly spaced rows, over finite entries, each coordinate rounded to half the binary order of
/// its spread: subtracting it is then exact for most points, and points with integer coordinates keep integer ones, so
/// ties stay ties. Any common point is a valid centre. A block takes 32 coordinates.
template <class T>
struct Center {
  static constexpr int64_t kSamples = 256;
  Source<T> source;
  T* center;

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
    if (spread > 0) {
      const double grid = ldexp(1.0, ilogb(spread) - 1);
      mean = nearbyint(mean / grid) * grid;
    }
    center[k] = static_cast<T>(mean);
  }
};

template <class T>
const T* center_of(cuda::Context& c, const Source<T>& source) {
  T* center = c.take<T>(source.rows.d);
  c.launch(ceil_div(source.rows.d, cuda::kWarp), Center<T>{source, center});
  return center;
}

// ---- the last step of a gradient
// -------------------------------------------------------------------------------------

/// Rows of another set that enter the gradient of a row by themselves: sum over c of weight * other.
enum class Enter {
  none,
  own,        // of row i: row (i + shift) % n of other, weight[i]
  reverse,    // of row i < n: row j of other with (j + shift) % n = i, weight[j]
  paired,     // of row i: rows i * each ... of other, the weights of these
  paired_by,  // of row q: row q / each of other, weight[q]
};

template <class T>
struct Term {
  Enter enter = Enter::none;
  const T* weight = nullptr;
  Source<T> other;
  int64_t n = 0, shift = 0, each = 1;

  NEARFAR_DEVICE int64_t count(int64_t i) const {
    if (enter == Enter::none || (enter == Enter::reverse && i >= n)) return 0;
    return enter == Enter::paired ? each : 1;
  }
  NEARFAR_DEVICE T value(int64_t i, int64_t c, int64_t k) const {
    int64_t row = i, at = i;
    if (enter == Enter::own) row = (i + shift) % n;
    if (enter == Enter::reverse) row = at = (i + n - shift % n) % n;
    if (enter == Enter::paired) row = at = i * each + c;
    if (enter == Enter::paired_by) row = i / each;
    return weight[at] * other.get(row, k);
  }
};

/// A warp a row: adds the terms, multiplies, and goes from the gradient of the normalised row to that of the row
/// itself: for u = x / |x|, dx = (du - u <u, du>) / |x|. along_i = <u, du>.
template <class T>
struct FinishRows {
  Source<T> source;
  T* grad;
  Term<T> terms[3];
  const double* scale;  // on the device; null: 1
  double multiply;
  double* along;       // null: not wanted
  bool fresh = false;  // the terms are all there is: what lies in `grad` is not read

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp(), d = source.rows.d;
    if (i >= source.rows.n) return;
    const T factor = static_cast<T>(multiply * (scale ? *scale : 1));
    T* g = grad + i * d;
    double sum = 0;
    for (int64_t k = cuda::lane_index(); k < d; k += cuda::kWarp) {
      T value = fresh ? T(0) : g[k];
      for (const Term<T>& term : terms)
        for (int64_t c = 0; c < term.count(i); ++c) value += term.value(i, c, k);
      value *= factor;
      g[k] = value;
      sum += static_cast<double>(value) * static_cast<double>(source.get(i, k));
    }
    if (!along && !source.inverse) return;
    sum = cuda::warp_sum(sum);
    if (along && cuda::lane_index() == 0) along[i] = sum;
    if (!source.inverse) return;
    const T inverse = source.inverse[i];
    for (int64_t k = cuda::lane_index(); k < d; k += cuda::kWarp)
      g[k] = inverse * (g[k] - source.get(i, k) * static_cast<T>(sum));
  }
};

template <class T>
void finish_rows(cuda::Context& c, const Source<T>& source, T* grad, const FinishRows<T>& step) {
  FinishRows<T> own = step;
  own.source = source;
  own.grad = grad;
  c.launch_warps(source.rows.n, own);
}

/// Sums in an order that depends on the count alone: one block, a thread every 256th, then a tree.
struct OrderedSum {
  const double* values;
  int64_t count;
  NEARFAR_DEVICE double operator()() const {
    NEARFAR_SHARED double sums[cuda::kThreads];
    const int thread = cuda::thread_index();
    double sum = 0;
    for (int64_t k = thread; k < count; k += cuda::kThreads) sum += values[k];
    sums[thread] = sum;
    cuda::sync_block();
    for (int half = cuda::kThreads / 2; half > 0; half /= 2) {
      if (thread < half) sums[thread] += sums[thread + half];
      cuda::sync_block();
    }
    return sums[0];
  }
};

struct StoreSum {
  OrderedSum sum;
  double* out;
  NEARFAR_DEVICE void operator()() const {
    const double total = sum();
    if (cuda::thread_index() == 0) *out = total;
  }
};

}  // namespace device
}  // namespace nearfar
