// Problems so small that their rows would leave lanes empty, as in a batch of thousands: as many as a vector has lanes
// go together, one a lane.
//
//   points   X[i][k][problem]       all rows of a problem are one row, and these are turned as rows are packed
//   scores   S[i][j][problem]       sum_k of score(X[i][k], Y[j][k]), vectors all
//   sums     dX[i][k][problem] = sum_j by(X[i][k], Y[j][k], W[i][j]),  dY the same with its points in place of x
//
// Every step is vertical, so nothing is reduced, masked or packed a second time. Distances come from differences, and
// so do their gradients: no centre, no expansion, no near pairs.
#pragma once

#include "cpu/program.hpp"

namespace nearfar {
namespace {

/// Whether problems of (n, d) and (m, d) go together: points and matrices of as many as there are lanes stay in L2.
template <class T>
bool tiny(int64_t n, int64_t m, int64_t d) {
  constexpr int64_t NR = Policy<T>::NR;
  return n > 0 && m > 0 && n * m <= NR * NR && (n + m) * d <= 64 * NR;
}

/// Problems of one shape: several(first, how many) for as many as there are lanes where they are tiny, else one(each).
/// widest: the most columns of what belongs to a row.
template <class T, class Params, class One, class Several>
void each_or_together(const Params* p, int64_t count, int64_t widest, One one, Several several) {
  const bool together = count > 1 && tiny<T>(p->x.n, p->y.n, widest);
  const int64_t step = together ? kLanes<T> : 1;
  for (int64_t u = 0; u < count; u += step) together ? several(p + u, count - u < step ? count - u : step) : one(p[u]);
}

/// Numbers of the compute type, one behind the other, as a row.
template <class T>
Rows row_of_numbers(const T* data, int64_t size) {
  return {data, 1, size, size, 1, sizeof(T) == 8 ? DType::f64 : DType::f32};
}

/// Rows (n, d) of up to kLanes problems as [row][coordinate][problem]. A lane without a problem has zeros: no score of
/// these overflows, so the sums over all lanes do not feel it.
template <class T>
class Turned {
 public:
  static constexpr int L = kLanes<T>;

  /// rows(u): those of problem u. unit: brought to unit norm.
  template <class F>
  Turned(int64_t count, F rows, bool unit = false) {
    const Rows shape = rows(0);
    n = shape.n, d = shape.d;
    const int64_t size = n * d, stride = padded<T>(size);
    data_ = Buffer<T>(size * L);
    if (unit) inverse_ = Buffer<T>(n * L);
    Buffer<T> copies(L * stride);
    const T* flat[L];
    for (int u = 0; u < L; ++u) {
      T* copy = copies.get() + u * stride;
      flat[u] = u < count ? read(rows(u), unit, u, stride == size, copy) : copy;
      for (int64_t k = 0; u >= count && k < stride; ++k) copy[k] = 0;
      for (int64_t i = 0; u >= count && unit && i < n; ++i) inverse_[i * L + u] = 0;
    }
    interleave<L, T>(size, data_.get(), [&](int u, int64_t k) { return load(flat[u] + k); });
  }

  const T* row(int64_t i) const { return data_.get() + i * d * L; }
  T* data() const { return data_.get(); }
  bool unit() const { return inverse_.get() != nullptr; }

  /// The gradient of these rows to that of the rows as given, through their norms, in place.
  void finish(T* gradient) const {
    for (int64_t i = 0; unit() && i < n; ++i) {
      const T* own = row(i);
      T* out = gradient + i * d * L;
      Vec<T> along{};
      for (int64_t k = 0; k < d * L; k += L) along += load(own + k) * load(out + k);
      const Vec<T> inverse = load(inverse_.get() + i * L);
      for (int64_t k = 0; k < d * L; k += L) store(out + k, inverse * (load(out + k) - load(own + k) * along));
    }
  }

  int64_t n, d;

 private:
  /// Problem u as one row: where it lies, if vectors can be read there, else copied.
  const T* read(Rows rows, bool unit, int u, bool whole, T* copy) const {
    if (!unit && rows.row_stride == d * rows.col_stride) {
      rows.d *= rows.n;
      rows.n = 1;
      if (whole) return Source<T>(rows).view(0, copy);
    }
    Source<T> source(rows);
    if (unit) source.normalize_as_read();
    for (int64_t i = 0; i < rows.n; ++i) {
      source.get_new(i, copy + i * d);
      if (unit) inverse_[i * L + u] = source.inverse_norm(i);
    }
    return copy;
  }

  Buffer<T> data_, inverse_;
};

/// to(u)[e] = from[e][u], or added to it, for e < size and the problems u < count.
template <bool ADD, class T, class F>
void turn_back(int64_t count, int64_t size, const T* from, F to) {
  constexpr int L = kLanes<T>;
  for (int64_t e = 0; e < size; e += L) {
    Vec<T> block[L];
#pragma GCC unroll 16
    for (int u = 0; u < L; ++u) block[u] = e + u < size ? load(from + (e + u) * L) : Vec<T>{};
    transpose<T>(block);
    alignas(64) T lanes[L][L];
    const int64_t values = size - e < L ? size - e : L;
    if (values < L)
#pragma GCC unroll 16
      for (int u = 0; u < L; ++u) store(lanes[u], block[u]);
#pragma GCC unroll 16
    for (int u = 0; u < L; ++u) {
      if (u >= count) break;
      T* out = to(u) + e;
      if (values == L) {
        store(out, ADD ? load(out) + block[u] : block[u]);
      } else {
        for (int64_t k = 0; k < values; ++k) out[k] = ADD ? out[k] + lanes[u][k] : lanes[u][k];
      }
    }
  }
}

/// S[i][j] of all pairs.
template <class T, class Score>
void scores_of(const Turned<T>& x, const Turned<T>& y, T* out, Score score) {
  constexpr int L = kLanes<T>;
  const auto several = [&](auto columns, int64_t i, int64_t j) {
    constexpr int J = decltype(columns)::value;
    const T *own = x.row(i), *other = y.row(j);
    Vec<T> sum[J] = {};
    for (int64_t k = 0; k < x.d * L; k += L) {
      const Vec<T> a = load(own + k);
#pragma GCC unroll 4
      for (int u = 0; u < J; ++u) score.accumulate(sum[u], a, load(other + u * x.d * L + k));
    }
#pragma GCC unroll 4
    for (int u = 0; u < J; ++u) store(out + (i * y.n + j + u) * L, sum[u]);
  };
  for (int64_t i = 0; i < x.n; ++i) {
    int64_t j = 0;
    for (; j + 4 <= y.n; j += 4) several(std::integral_constant<int, 4>{}, i, j);
    for (; j < y.n; ++j) several(std::integral_constant<int, 1>{}, i, j);
  }
}

/// out[i][k] = sum_j by(where x_i[k] is, y_j[k], place of the pair), for i < n; pair (i, j) is i * row + j * column.
template <class T, class By>
void sum_over(int64_t n, const T* x, const Turned<T>& y, int64_t row, int64_t column, const By& by, T* out) {
  constexpr int L = kLanes<T>;
  const int64_t d = y.d;
  const auto several = [&](auto coordinates, int64_t k) {
    constexpr int K = decltype(coordinates)::value;
    for (int64_t i = 0; i < n; ++i) {
      Vec<T> sum[K] = {};
      for (int64_t j = 0; j < y.n; ++j) {
        const int64_t place = (i * row + j * column) * L;
#pragma GCC unroll 4
        for (int u = 0; u < K; ++u) sum[u] += by(x + (i * d + k + u) * L, load(y.row(j) + (k + u) * L), place);
      }
#pragma GCC unroll 4
      for (int u = 0; u < K; ++u) store(out + (i * d + k + u) * L, sum[u]);
    }
  };
  int64_t k = 0;
  for (; k + 4 <= d; k += 4) several(std::integral_constant<int, 4>{}, k);
  for (; k < d; ++k) several(std::integral_constant<int, 1>{}, k);
}

/// The summand by the other point of a pair with a weight.
template <class T>
auto times_other(const T* weights) {
  return [weights](const T*, Vec<T> other, int64_t place) { return load(weights + place) * other; };
}
/// By the difference.
template <class T>
auto times_difference(const T* weights) {
  return [weights](const T* own, Vec<T> other, int64_t place) { return load(weights + place) * (load(own) - other); };
}

/// Adds to the gradients of both sets, at(u) of the problems: rows of `stride` values, of which this is the part that
/// the points have.
template <class T, class By, class DX, class DY>
void add_gradients(int64_t count, const Turned<T>& x, const Turned<T>& y, const By& by, int64_t stride, DX dx, DY dy) {
  const auto add = [&](const Turned<T>& own, const Turned<T>& other, int64_t row, int64_t column, auto to) {
    if (!to(0)) return;
    Buffer<T> sums(own.n * own.d * kLanes<T>);
    sum_over(own.n, own.data(), other, row, column, by, sums.get());
    own.finish(sums.get());
    const bool whole = own.d == stride;
    for (int64_t i = 0; i < (whole ? 1 : own.n); ++i)
      turn_back<true>(count, whole ? own.n * own.d : own.d, sums.get() + i * own.d * kLanes<T>,
                      [&](int u) { return to(u) + i * stride; });
  };
  add(x, y, y.n, 1, dx);
  add(y, x, 1, y.n, dy);
}

/// The scores of a program, of up to kLanes problems.
template <class T>
class ScoresTogether {
  static constexpr int L = kLanes<T>;

 public:
  /// p: with points x and y, and their program. same: y is x.
  template <class Params>
  ScoresTogether(const Params* p, int64_t count, bool same)
      : size(p->x.n * p->y.n * L), count_(count), d_(p->x.d), program_(*p->program), blocks_(program_.scores * size) {
    for (int s = 0; s < program_.scores; ++s) {
      const ProgramScore& score = program_.score[s];
      const bool unit = score.kind == ScoreKind::unit_dot;
      const Turned<T>& x = x_.add(count, [&](int u) { return columns_of(p[u].x, score); }, unit);
      const Turned<T>& y = y_.add(count, [&](int u) { return columns_of(p[u].y, score); }, unit);
      tiles[s] = blocks_.get() + s * size;
      with_score(score.kind, [&](auto how) { scores_of(x, y, tiles[s], how); });
      // <u, u> of a unit row is 1 up to rounding; of a zero row it is 0.
      for (int64_t at = 0; same && unit && at < size; at += (x.n + 1) * L) {
        const Vec<T> own = load(tiles[s] + at);
        store(tiles[s] + at, select(own > T(0.5), splat<T>(1), own));
      }
    }
  }

  /// Values of the pairs, in the first tile.
  T* values() const {
    Evaluator<T>(program_).forward(tiles, size, tiles[0]);
    return tiles[0];
  }

  /// What program_gradient adds, for an upstream gradient of the pairs; dx(u), dy(u) of the problems.
  template <class DX, class DY>
  void gradient(const T* upstream, DX dx, DY dy, double* sums) const {
    const Evaluator<T> evaluator(program_);
    auto sweep = evaluator.sweep();
    for (int64_t k = 0; k < size; k += Evaluator<T>::kRun) {
      const int64_t run = size - k < Evaluator<T>::kRun ? size - k : Evaluator<T>::kRun;
      evaluator.evaluate(tiles, k, run, sweep);
      evaluator.pull(tiles, upstream + k, k, run, sweep, sums);
    }
    for (int s = 0; s < program_.scores; ++s) {
      const ScoreKind kind = program_.score[s].kind;
      const int64_t begin = program_.score[s].begin;
      const T* weights = tiles[s];
      const auto add = [&](const auto& by) {
        add_gradients(
            count_, x_[s], y_[s], by, d_, [&](int u) { return dx(u) ? dx(u) + begin : nullptr; },
            [&](int u) { return dy(u) ? dy(u) + begin : nullptr; });
      };
      if (kind == ScoreKind::sqeuclidean) {
        add(times_difference(weights));
      } else if (!by_coordinates(kind)) {
        add(times_other(weights));
      } else {
        with_coordinate_score(kind, [&](auto score) {
          add([weights](const T* own, Vec<T> other, int64_t place) {
            Vec<T> slope, by_other;  // the same with both points exchanged
            decltype(score)::slopes(load(own), other, slope, by_other);
            return load(weights + place) * slope;
          });
        });
      }
    }
  }

  const int64_t size;  // of a tile
  T* tiles[Program::kScores];

 private:
  template <class F>
  static void with_score(ScoreKind kind, F f) {
    if (by_coordinates(kind)) return with_coordinate_score(kind, f);
    if (kind == ScoreKind::sqeuclidean) return f(SquaredDifference{});
    f(Dot{});
  }

  const int64_t count_, d_;
  const Program& program_;
  Buffer<T> blocks_;
  PerScore<Turned<T>> x_, y_;
};

}  // namespace
}  // namespace nearfar
