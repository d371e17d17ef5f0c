// Program: a kernel, composed or not, as a short list of steps on the scores of a pair. The scores come first, each
// once however many steps read it; then steps, each on the values of earlier ones. What a step computes: map.hpp.
//
// Registers are numbered: the scores 0, 1, ..., then one register a step. The value of the program is the last one.
#pragma once

#include <cstdint>

namespace nearfar {

enum class ScoreKind : int {
  dot,
  unit_dot,     // of rows brought to unit norm: where y is x, exactly 1 on the diagonal
  sqeuclidean,  // |x - y|^2
  absolute,     // sum_k |x_k - y_k|
  chi_squared,  // sum_k (x_k - y_k)^2 / (x_k + y_k)
};

enum class StepKind : int {
  gaussian,
  matern12,
  matern32,
  matern52,
  rational_quadratic,
  laplacian,
  affine,
  tanh,
  power,
  scale,
  add,
  multiply,
};

/// A score of columns [begin, end) of both point sets.
struct ProgramScore {
  ScoreKind kind;
  int64_t begin, end;
};

struct ProgramStep {
  StepKind kind;
  int left;   // register
  int right;  // register (add, multiply), exponent (power), else the first parameter
};

/// Checked by whoever fills it: operands are earlier registers, parameters exist, columns lie within the points.
struct Program {
  static constexpr int kScores = 8, kSteps = 64, kParameters = 64;
  int scores = 0, steps = 0, parameters = 0;
  ProgramScore score[kScores];
  ProgramStep step[kSteps];
  double parameter[kParameters];

  /// Whether its slopes are the same whatever the scores are: a sum of multiples of them.
  bool linear() const {
    for (int s = 0; s < steps; ++s) {
      const StepKind kind = step[s].kind;
      if (kind != StepKind::affine && kind != StepKind::scale && kind != StepKind::add) return false;
    }
    return true;
  }
};

}  // namespace nearfar
