// Programs (pairwise/program.hpp) on the device: the tile engine leaves every score of a block of pairs in a buffer of
// its own, then one thread a pair evaluates the program there, or by a reverse sweep the pull of every score. The
// Gaussian by itself is compiled into the engine's epilogue, and its pairs never lie in memory as scores.
//
// Steps reach kernels by value, and parameters by value or from where they lie on the device: nothing waits.
#pragma once

#include <optional>

#include "cuda/coordinate.hpp"
#include "cuda/simt.hpp"

namespace nearfar {
inline namespace device {

// ---- parameters and evaluation -------------------------------------------------------------------------------------

template <class T>
struct PutParameters {
  double value[Program::kParameters];
  const double* at;  // null: `value`
  int count;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const int64_t k = cuda::global_thread();
    if (k < count) out[k] = parameter_of<T>(at ? at[k] : value[k]);
  }
};

/// The largest number in place of infinity; NaN stays. The pull of a tiny length scale overflows where two points
/// coincide, and meets a difference of 0 there.
template <class T>
NEARFAR_DEVICE T finite(T v) {
  constexpr T kMost = std::numeric_limits<T>::max();
  return v > kMost ? kMost : v < -kMost ? -kMost : v;
}

/// A program as kernels hold it.
template <class T>
struct DeviceProgram {
  static constexpr int kRegisters = Program::kScores + Program::kSteps;
  int scores, steps, parameters;
  ProgramStep step[Program::kSteps];
  bool square[Program::kScores];  // is the score a squared distance?
  const T* parameter;

  DeviceProgram(cuda::Context& c, const Program& program, const double* parameters_at)
      : scores(program.scores), steps(program.steps), parameters(program.parameters) {
    PutParameters<T> put{{}, parameters_at, parameters, c.take<T>(parameters)};
    for (int s = 0; s < steps; ++s) step[s] = program.step[s];
    for (int s = 0; s < scores; ++s) square[s] = program.score[s].kind == ScoreKind::sqeuclidean;
    for (int k = 0; k < parameters; ++k) put.value[k] = program.parameter[k];
    c.launch_threads(parameters, put);
    parameter = put.out;
  }

  bool is_gaussian() const { return scores == 1 && steps == 1 && square[0] && step[0].kind == StepKind::gaussian; }

  /// Registers from scores on; the last is the value.
  NEARFAR_DEVICE T evaluate(T* registers) const {
    NEARFAR_ROLLED
    for (int s = 0; s < steps; ++s) {
      const ProgramStep& own = step[s];
      const T a = registers[own.left];
      T& to = registers[scores + s];
      if (own.kind == StepKind::add) {
        to = a + registers[own.right];
      } else if (own.kind == StepKind::multiply) {
        to = a * registers[own.right];
      } else {
        with_step<T>(own, parameter + own.right, [&](auto map) { to = map.value(a); });
      }
    }
    return registers[scores + steps - 1];
  }

  /// slopes[r] = upstream * d value / d register r. Adds upstream * d value / d parameter to `sums`, if that is not
  /// null.
  NEARFAR_DEVICE void reverse(const T* registers, T upstream, T* slopes, double* sums) const {
    NEARFAR_ROLLED
    for (int r = 0; r < scores + steps - 1; ++r) slopes[r] = 0;
    slopes[scores + steps - 1] = upstream;
    NEARFAR_ROLLED
    for (int s = steps - 1; s >= 0; --s) {
      const ProgramStep& own = step[s];
      const T from = slopes[scores + s], a = registers[own.left], value = registers[scores + s];
      if (own.kind == StepKind::add) {
        slopes[own.left] += from;
        slopes[own.right] += from;
      } else if (own.kind == StepKind::multiply) {
        const T b = registers[own.right];
        slopes[own.left] += from * b;
        slopes[own.right] += from * a;
      } else {
        with_step<T>(own, parameter + own.right, [&](auto map) {
          slopes[own.left] += from * map.slope(a, value);
          for (int p = 0; sums && p < map.kParameters; ++p)
            sums[own.right + p] += static_cast<double>(from * map.by(p, a, value));
        });
      }
    }
  }
};

// ---- what the tile engine leaves -----------------------------------------------------------------------------------

/// The score itself. mend: <u, u> of a unit row is 1 up to rounding; of a zero row it is 0.
template <class T>
struct PutScore {
  bool mend;
  NEARFAR_DEVICE PutScore begin() const { return *this; }
  NEARFAR_DEVICE T operator()(int64_t i, int64_t j, T score) const {
    return mend && i == j && score > T(0.5) ? T(1) : score;
  }
};

template <class T>
struct PutGaussian {
  const T* parameter;
  struct Put {
    GaussianStep<T> step;
    NEARFAR_DEVICE T operator()(int64_t, int64_t, T score) const { return step.value(score); }
  };
  NEARFAR_DEVICE Put begin() const { return {GaussianStep<T>(parameter)}; }
};

/// Leaves something of every pair in `out`, 0 outside if that has room there, and marks near pairs where it has bits.
template <class T, class Put>
struct ProgramEpilogue {
  static constexpr bool kDistances = true;
  Scores<T> scores;
  Weights<T> out;
  int64_t n, m;
  bool outside;
  Put put;

  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    const int64_t i0 = out.block.row + f.i0, j0 = out.block.column + f.j0;
    const uint64_t hidden = device::outside(f, out.block, n, m);
    const uint64_t near = scores.apply(f, i0, j0, hidden);
    const auto one = put.begin();
    NEARFAR_UNROLL
    for (int a = 0; a < P::kRows; ++a) NEARFAR_UNROLL
    for (int b = 0; b < P::kCols; ++b)
      f(a, b) = hidden >> (a * P::kCols + b) & 1 ? T(0) : one(i0 + P::row(a), j0 + P::col(b), f(a, b));
    f.store(outside ? 0 : hidden, [&](int a) { return out.w + f.i(a) * out.pitch + f.j0; });
    if (out.near) f.for_bits(near, [&](int a, int b) { out.mark(i0 + P::row(a), j0 + P::col(b)); });
  }
};

// ---- a thread a pair -----------------------------------------------------------------------------------------------

constexpr int64_t kPairRows = 32, kPairColumns = 128;  // of a block of threads
static_assert(kPadRows % kPairColumns == 0 && kPadRows % kPairRows == 0, "blocks of pairs are cut evenly");

inline int64_t pair_blocks(const Block& b) { return b.rows / kPairRows * (b.columns / kPairColumns); }

/// f(i, j) for the pairs of a thread.
template <class F>
NEARFAR_DEVICE void for_pairs(const Block& b, F f) {
  const int64_t across = b.columns / kPairColumns, block = cuda::block_index();
  const int64_t j = b.column + block % across * kPairColumns + cuda::thread_index() % kPairColumns;
  const int64_t first = b.row + block / across * kPairRows;
  NEARFAR_ROLLED
  for (int64_t i = first + cuda::thread_index() / kPairColumns; i < first + kPairRows;
       i += cuda::kThreads / kPairColumns)
    f(i, j);
}

/// The scores of a block of pairs, each in a buffer of its own, and the program that they enter.
template <class T>
struct PairScores {
  static constexpr int kRegisters = DeviceProgram<T>::kRegisters;
  DeviceProgram<T> program;
  Weights<T> score[Program::kScores];

  /// The value of a pair. `pull` needs the registers.
  NEARFAR_DEVICE T value(int64_t i, int64_t j, T* registers) const {
    for (int s = 0; s < program.scores; ++s) registers[s] = score[s].at(i, j);
    return program.evaluate(registers);
  }
  /// Upstream gradient times the pull of every score, in the place of the score; `sums`: as for `reverse`.
  NEARFAR_DEVICE void pull(int64_t i, int64_t j, const T* registers, T upstream, double* sums) const {
    T slopes[kRegisters];
    program.reverse(registers, upstream, slopes, sums);
    for (int s = 0; s < program.scores; ++s) score[s].at(i, j) = finite(program.square[s] ? 2 * slopes[s] : slopes[s]);
  }
  /// The pull of a pair that does not count.
  NEARFAR_DEVICE void clear(int64_t i, int64_t j) const {
    for (int s = 0; s < program.scores; ++s) score[s].at(i, j) = 0;
  }
};

/// The program's values from its scores, in the place of the first; 0 outside if that has room there.
template <class T>
struct EvaluatePairs {
  PairScores<T> pairs;
  int64_t n, m;
  bool outside;

  NEARFAR_DEVICE void operator()() const {
    for_pairs(pairs.score[0].block, [&](int64_t i, int64_t j) {
      const bool inside = i < n && j < m;
      if (!inside && !outside) return;
      T registers[PairScores<T>::kRegisters];
      pairs.score[0].at(i, j) = inside ? pairs.value(i, j, registers) : T(0);
    });
  }
};

/// The gradient by one set through L1 distances, which is no matrix product; a thread a coordinate:
/// Weights of the pairs of a row of x, or with ROWS false of y; the distance itself is not needed.
template <class T, bool ROWS>
struct OwnWeights {
  Weights<T> weights;
  NEARFAR_DEVICE void operator()(int64_t own, int64_t other, T& grad, T& value) const {
    grad = ROWS ? weights.at(own, other) : weights.at(other, own);
    value = 0;
  }
};

// ---- launches ------------------------------------------------------------------------------------------------------

template <class T>
Weights<T> part_of(T* matrix, int64_t pitch, const Block& b) {
  return {matrix + b.row * pitch + b.column, nullptr, pitch, b};
}

/// A program with the packed point sets of its scores.
template <class T>
class PackedProgram {
 public:
  /// same: y is x. products: as for Pairs.
  PackedProgram(cuda::Context& c, const Program& text, const double* parameters_at, const Rows& x, const Rows& y,
                bool same, bool products)
      : program(c, text, parameters_at), n(x.n), m(y.n), c_(c) {
    for (int s = 0; s < text.scores; ++s) {
      const ProgramScore& score = text.score[s];
      kind_[s] = score.kind;
      pairs_[s].emplace(c, columns_of(x, score), columns_of(y, score), false, program.square[s], products, false,
                        by_coordinates(s) ? PairUse::rows : PairUse::scores);
      mend_[s] = same && score.kind == ScoreKind::unit_dot;
    }
  }
  PackedProgram(const PackedProgram&) = delete;
  PackedProgram& operator=(const PackedProgram&) = delete;

  const Pairs<T, T>& operator[](int s) const { return *pairs_[s]; }
  /// Has score s products of its own, by coordinates?
  bool by_coordinates(int s) const { return nearfar::by_coordinates(kind_[s]); }

  template <class Put>
  void put(int s, const Weights<T>& out, bool outside, const Put& put) const {
    const Pairs<T, T>& pairs = *pairs_[s];
    launch_scores(c_, plan_scores(c_, "scores of a kernel", pairs, out.block), pairs, out.block,
                  ProgramEpilogue<T, Put>{pairs.scores, out, n, m, outside, put});
  }
  void put_scores(int s, const Weights<T>& out) const {
    const PutScore<T> score{mend_[s]};
    if (!by_coordinates(s)) return put(s, out, false, score);
    with_coordinate_score(kind_[s], [&](auto of_pair) {
      launch_coordinates(c_, of_pair, *pairs_[s], out.block,
                         ProgramEpilogue<T, PutScore<T>>{pairs_[s]->scores, out, n, m, false, score});
    });
  }
  /// The products of a strip's weights, which are pulls of score s, with both sets. dy null: not wanted.
  void products(int s, Strip<T, T>& strip, const Weights<T>& weights, T* dx, T* dy) const {
    if (!by_coordinates(s)) return strip.products(weights);
    const Block& b = weights.block;
    const Packed<T, T>&x = pairs_[s]->x, &y = pairs_[s]->y;
    with_coordinate_score(kind_[s], [&](auto score) {
      const ScoreSlopes<decltype(score)> slopes;
      add_coordinate_gradient(c_, slopes, OwnWeights<T, true>{weights}, x, y, b.row, b.rows, b.column,
                              b.column + b.columns, dx);
      if (dy)
        add_coordinate_gradient(c_, slopes, OwnWeights<T, false>{weights}, y, x, b.column, b.columns, b.row,
                                b.row + b.rows, dy);
    });
  }

  /// Buffers for the other scores of a block as large as `shape`.
  void take_others(const StripShape& shape) {
    for (int s = 1; s < program.scores; ++s)
      others_[s] = {c_.take<T>(shape.rows * shape.columns), nullptr, shape.columns, {}};
  }
  /// The program's values in a block.
  void values(const Weights<T>& out, bool outside) const {
    if (program.is_gaussian()) return put(0, out, outside, PutGaussian<T>{program.parameter});
    EvaluatePairs<T> evaluate{{program, {out}}, n, m, outside};
    for (int s = 0; s < program.scores; ++s) {
      Weights<T>& score = evaluate.pairs.score[s];
      if (s > 0) score = others_[s];
      score.block = out.block;
      put_scores(s, score);
    }
    if (program.steps > 0 || outside) c_.launch(pair_blocks(out.block), evaluate);
  }

  const DeviceProgram<T> program;
  const int64_t n, m;

 private:
  cuda::Context& c_;
  std::optional<Pairs<T, T>> pairs_[Program::kScores];
  Weights<T> others_[Program::kScores]{};
  bool mend_[Program::kScores]{};
  ScoreKind kind_[Program::kScores]{};
};

}  // namespace device
}  // namespace nearfar
