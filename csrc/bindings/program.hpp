// A kernel's program from its text, checked: python/nearfar/kernels/program.py writes it.
#pragma once

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <string_view>

#include "bindings/array.hpp"
#include "pairwise/program.hpp"

namespace nearfar {
namespace {

struct ScoreName {
  const char* name;
  ScoreKind kind;
};
constexpr ScoreName kScoreNames[] = {{"dot", ScoreKind::dot},
                                     {"unit_dot", ScoreKind::unit_dot},
                                     {"sqeuclidean", ScoreKind::sqeuclidean},
                                     {"absolute", ScoreKind::absolute},
                                     {"chi_squared", ScoreKind::chi_squared}};

struct StepName {
  const char* name;
  StepKind kind;
  int parameters;
};
constexpr StepName kStepNames[] = {{"gaussian", StepKind::gaussian, 1},
                                   {"matern12", StepKind::matern12, 1},
                                   {"matern32", StepKind::matern32, 1},
                                   {"matern52", StepKind::matern52, 1},
                                   {"rational_quadratic", StepKind::rational_quadratic, 3},
                                   {"laplacian", StepKind::laplacian, 1},
                                   {"affine", StepKind::affine, 2},
                                   {"tanh", StepKind::tanh, 0},
                                   {"power", StepKind::power, 0},
                                   {"scale", StepKind::scale, 1},
                                   {"add", StepKind::add, 0},
                                   {"multiply", StepKind::multiply, 0}};

/// "name left right; ...", scores first. A score: its columns begin and end (-1: the last). A step: its register and
/// its first parameter; `power`: register and exponent; `add`, `multiply`: two registers. Parameters that are not on
/// the CPU are counted only.
inline Program parse_program(const std::string& text, const Array& values, int64_t depth) {
  Program program;
  if (values.ndim != 1 || values.shape[0] > Program::kParameters)
    refuse_value("parameters", "expected a vector of at most 64 numbers, got shape " + shape_of(values));
  program.parameters = static_cast<int>(values.shape[0]);
  for (int k = 0; k < program.parameters && values.on_cpu(); ++k)
    program.parameter[k] = values.as<const double>()[k * values.strides[0]];
  // Not by streams, which take as long as a small matrix.
  for (size_t begin = 0, end = 0; begin < text.size(); begin = end + 1) {
    end = std::min(text.find(';', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    char word[32];
    int64_t left = 0, right = 0;
    const int registers = program.scores + program.steps;
    auto refuse = [&] { refuse_value("program", "cannot use \"" + line + "\""); };
    if (std::sscanf(line.c_str(), "%31s %" SCNd64 " %" SCNd64, word, &left, &right) != 3) refuse();
    const std::string_view name = word;
    bool known = false;
    for (const ScoreName& s : kScoreNames)
      if (name == s.name) {
        if (right < 0) right = depth;
        if (program.steps || program.scores == Program::kScores || left < 0 || left >= right || right > depth) refuse();
        program.score[program.scores++] = {s.kind, left, right};
        known = true;
      }
    for (const StepName& s : kStepNames)
      if (name == s.name) {
        if (program.steps == Program::kSteps || left < 0 || left >= registers || right < 0) refuse();
        const bool two = s.kind == StepKind::add || s.kind == StepKind::multiply;
        if (two ? right >= registers : right + s.parameters > program.parameters && s.kind != StepKind::power) refuse();
        if (s.kind == StepKind::power && (right < 1 || right > (1 << 20))) refuse();
        program.step[program.steps++] = {s.kind, static_cast<int>(left), static_cast<int>(right)};
        known = true;
      }
    if (!known) refuse();
  }
  if (program.scores == 0 || (program.steps == 0 && program.scores > 1)) refuse_value("program", "has no value");
  return program;
}
inline Program parse_program(const std::string& text, py::handle parameters, int64_t depth) {
  return parse_program(text, input(parameters, "parameters", 1, {DType::f64}), depth);
}

}  // namespace
}  // namespace nearfar
