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

// ---- launches, whose kernels are compiled in one place: programs.cu -------------------------------------------------

template <class T>
Weights<T> part_of(T* matrix, int64_t pitch, const Block& b) {
  return {matrix + b.row * pitch + b.column, nullptr, pitch, b};
}

/// Scores of pairs that are no kernel's, into the block of `out`.
template <class T>
void put_scores(cuda::Context& c, const char* operation, const Pairs<T, T>& pairs, const Weights<T>& out);

/// A program with the packed point sets of its scores.
template <class T>
class PackedProgram {
 public:
  /// same: y is x. products: as for Pairs.
  PackedProgram(cuda::Context& c, const Program& text, const double* parameters_at, const Rows& x, const Rows& y,
                bool same, bool products);
  PackedProgram(const PackedProgram&) = delete;
  PackedProgram& operator=(const PackedProgram&) = delete;

  const Pairs<T, T>& operator[](int s) const { return *pairs_[s]; }
  /// Has score s products of its own, by coordinates?
  bool by_coordinates(int s) const { return nearfar::by_coordinates(kind_[s]); }

  void put_scores(int s, const Weights<T>& out) const;
  /// Of a Gaussian by itself: upstream gradients times its pull, 0 outside. They may lie where the result goes.
  void gaussian_pulls(const Weights<T>& out, const Weights<T>& upstream) const;
  /// The products of a strip's weights, which are pulls of score s, with both sets. dy null: not wanted.
  void products(int s, Strip<T, T>& strip, const Weights<T>& weights, T* dx, T* dy) const;

  /// Buffers for the other scores of a block as large as `shape`.
  void take_others(const StripShape& shape);
  /// The program's values in a block, 0 outside if that has room there.
  void values(const Weights<T>& out, bool outside) const;

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
