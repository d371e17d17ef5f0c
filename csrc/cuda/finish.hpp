// The last step of a gradient, a warp a row, and sums of the numbers that rows leave.
#pragma once

#include "cuda/rows.hpp"

namespace nearfar {
inline namespace device {

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
  /// The row of `other`; `at`: of its weight.
  NEARFAR_DEVICE int64_t row(int64_t i, int64_t c, int64_t& at) const {
    at = i;
    if (enter == Enter::own) return (i + shift) % n;
    if (enter == Enter::reverse) at = (i + n - shift % n) % n;
    if (enter == Enter::paired) at = i * each + c;
    return enter == Enter::paired_by ? i / each : at;
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
  double* along;                       // null: not wanted
  bool fresh = false;                  // the terms are all there is: what lies in `grad` is not read
  static constexpr int kResident = 3;  // more warps are worth more than more of a row in registers

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= source.rows.n) return;
    bool wide = source.wide() && aligned(grad);
    for (const Term<T>& term : terms)
      if (term.enter != Enter::none) wide = wide && term.other.wide_as(source);
    choose_way<T>(wide, source.rows.dtype, [&](auto how) { finish(how, i); });
  }

 private:
  /// du is kept between its two uses where the row is short enough for the registers of a warp.
  template <class Way>
  NEARFAR_DEVICE void finish(Way how, int64_t i) const {
    constexpr int W = Way::kWide, kVectors = 2;
    constexpr int64_t kStep = cuda::kWarp * W, kKept = kVectors * kStep;
    const int64_t d = source.rows.d;
    const bool project = source.inverse, kept = project && d <= kKept;
    const T factor = static_cast<T>(multiply * (scale ? *scale : 1)), inverse = source.scale(i);
    T* const g = grad + i * d;
    Piece<T, W> du[kVectors];
    typename Way::Held x[kVectors];
    double sum = 0;
    // f(for_vectors) for every part of the row, with for_vectors(use): use(v, k) for the lane's pieces in it, k the
    // first number of piece v.
    const auto for_parts = [&](auto f) {
      NEARFAR_ROLLED
      for (int64_t k0 = cuda::lane_index() * W; k0 < d; k0 += kKept)
        f([&](auto use) {
          NEARFAR_UNROLL
          for (int v = 0; v < kVectors; ++v)
            if (k0 + v * kStep < d) use(v, k0 + v * kStep);
        });
    };
    for_parts([&](auto for_vectors) {
      for_vectors([&](int v, int64_t k) {
        du[v] = fresh ? Piece<T, W>{} : load_piece<W>(g + k);
        x[v] = source.hold(how, i, k);
      });
      NEARFAR_ROLLED
      for (const Term<T>& term : terms) {
        const int64_t count = term.count(i);
        NEARFAR_ROLLED
        for (int64_t c = 0; c < count; ++c) {
          int64_t at;
          const int64_t row = term.row(i, c, at);
          const T weight = term.weight[at], of_row = term.other.scale(row);
          typename Way::Held other[kVectors];
          for_vectors([&](int v, int64_t k) { other[v] = term.other.hold(how, row, k); });
          for_vectors([&](int v, int64_t) {
            NEARFAR_UNROLL
            for (int e = 0; e < W; ++e) du[v][e] += weight * (source.value(how, other[v], e) * of_row);
          });
        }
      }
      for_vectors([&](int v, int64_t k) {
        NEARFAR_UNROLL
        for (int e = 0; e < W; ++e) {
          du[v][e] *= factor;
          sum += static_cast<double>(du[v][e]) * static_cast<double>(source.value(how, x[v], e) * inverse);
        }
        if (!kept) store_piece(g + k, du[v]);
      });
    });
    if (!along && !project) return;
    sum = cuda::warp_sum(sum);
    if (along && cuda::lane_index() == 0) along[i] = sum;
    if (!project) return;
    for_parts([&](auto for_vectors) {
      if (!kept)
        for_vectors([&](int v, int64_t k) {
          du[v] = load_piece<W>(g + k);
          x[v] = source.hold(how, i, k);
        });
      for_vectors([&](int v, int64_t k) {
        NEARFAR_UNROLL
        for (int e = 0; e < W; ++e)
          du[v][e] = inverse * (du[v][e] - source.value(how, x[v], e) * inverse * static_cast<T>(sum));
        store_piece(g + k, du[v]);
      });
    });
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
