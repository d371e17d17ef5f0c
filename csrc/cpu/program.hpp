// Programs on blocks: all scores of a program for a block of pairs, its value, and by a reverse sweep the slope of the
// value by every score and the sums for the gradients of the parameters.
//
// A block is worked through in runs that stay in L1 with all their registers, so the switch on a step's kind costs once
// a run and what a step leaves is read from L1.
#pragma once

#include <new>

#include "cpu/strip.hpp"

namespace nearfar {
namespace {

/// The pairs of point sets that a program's scores read, packed. All have the same rows, so the same tiles and chunks.
template <class T>
class Scores {
  using P = Policy<T>;

 public:
  /// same: y is x. products: as for Operands.
  Scores(const Program& program, const Rows& x, const Rows& y, bool same, bool products, int threads)
      : count(program.scores), program_(program), same_(same) {
    int made = 0;
    try {
      for (; made < count; ++made) {
        const ProgramScore& s = program.score[made];
        new (operands_ + made * sizeof(Operands<T>))
            Operands<T>(columns_of(x, s), columns_of(y, s), false, s.kind == ScoreKind::sqeuclidean, products, threads,
                        s.kind == ScoreKind::absolute);
        depth_ += (*this)[made].d;
        widest_ = widest_ < (*this)[made].d ? (*this)[made].d : widest_;
      }
    } catch (...) {
      destroy(made);
      throw;
    }
  }
  ~Scores() { destroy(count); }
  Scores(const Scores&) = delete;
  Scores& operator=(const Scores&) = delete;

  Operands<T>& operator[](int s) const {
    return *std::launder(
        reinterpret_cast<Operands<T>*>(const_cast<unsigned char*>(operands_) + s * sizeof(Operands<T>)));
  }
  const Chunks& chunks() const { return (*this)[0].chunks; }

  // Sizes of what `pack` fills for a panel of NR rows of x, and of its workspace.
  int64_t packed() const { return P::NR * depth_; }
  int64_t squares() const { return P::NR * count; }
  int64_t row_buffer() const { return P::NR * padded<T>(widest_); }

  void pack(int64_t i0, T* rows, T* panel, T* squares) const {
    for (int s = 0; s < count; ++s) {
      (*this)[s].pack_panel(i0, T(1), rows, panel, squares + s * P::NR);
      panel += P::NR * (*this)[s].d;
    }
  }

  /// tiles[s] = score s of tiles [t0, t1) against a packed panel; all scores but `except`.
  void block(int64_t t0, int64_t t1, int64_t i0, const T* panel, const T* squares, T* const* tiles,
             int except = -1) const {
    for (int s = 0; s < count; ++s) {
      const Operands<T>& o = (*this)[s];
      if (s != except) {
        o.block(t0, t1, i0, panel, squares + s * P::NR, tiles[s]);
        if (same_ && program_.score[s].kind == ScoreKind::unit_dot) mend_diagonal(t0, t1, i0, tiles[s]);
      }
      panel += P::NR * o.d;
    }
  }

  const int count;

 private:
  /// <u, u> of a unit row is 1 up to rounding; of a zero row it is 0.
  static void mend_diagonal(int64_t t0, int64_t t1, int64_t i0, T* tile) {
    for (int64_t i = i0; i < i0 + P::NR; ++i)
      if (i >= t0 * P::MR && i < t1 * P::MR) {
        T& s = tile[(i - t0 * P::MR) * P::NR + i - i0];
        if (s > T(0.5)) s = 1;
      }
  }

  void destroy(int made) {
    while (made > 0) (*this)[--made].~Operands<T>();
  }

  const Program& program_;
  const bool same_;
  int64_t depth_ = 0, widest_ = 0;
  alignas(64) unsigned char operands_[Program::kScores * sizeof(Operands<T>)];
};

template <class T>
class Evaluator {
 public:
  static constexpr int64_t kRun = 2048 / static_cast<int64_t>(sizeof(T));

  explicit Evaluator(const Program& program) : p_(program) {
    for (int k = 0; k < p_.parameters; ++k) parameter_[k] = parameter_of<T>(p_.parameter[k]);
  }

  /// out[k] = the program's value for k < count, whole vectors; `out` may be one of the tiles.
  void forward(T* const* tiles, int64_t count, T* out) const {
    if (p_.steps == 1 && p_.scores == 1) return run_step(p_.step[0], tiles[0], tiles[0], count, out);
    alignas(64) T values[Program::kSteps][kRun];
    const T* registers[Program::kScores + Program::kSteps];
    for (int64_t k = 0; k < count; k += kRun) {
      const int64_t run = count - k < kRun ? count - k : kRun;
      const T* last = evaluate(tiles, k, run, values, registers);
      if (last != out + k) __builtin_memcpy(out + k, last, run * sizeof(T));
    }
  }

  /// weights[k] = upstream[k] * d value / d score for one of the scores, as a pull: twice that for squared distances.
  /// `weights` may be a tile. Adds sum_k upstream[k] * d value / d parameter to `sums`, if that is not null.
  void reverse(T* const* tiles, const T* upstream, int64_t count, int score, T* weights, double* sums) const {
    alignas(64) T values[Program::kSteps][kRun];
    alignas(64) T slopes[Program::kSteps][kRun], pull[kRun];
    const T* registers[Program::kScores + Program::kSteps];
    const T factor = p_.score[score].kind == ScoreKind::sqeuclidean ? T(2) : T(1);
    for (int64_t k = 0; k < count; k += kRun) {
      const int64_t run = count - k < kRun ? count - k : kRun;
      evaluate(tiles, k, run, values, registers);
      bool met[Program::kSteps] = {};
      clear(pull, run);
      // Where a register's slope is summed; null for the scores that are not asked for.
      auto target = [&](int r) -> T* {
        if (r < p_.scores) return r == score ? pull : nullptr;
        const int own = r - p_.scores;
        if (!met[own]) clear(slopes[own], run);
        met[own] = true;
        return slopes[own];
      };
      for (int s = p_.steps - 1; s >= 0; --s) {
        const T* from = s == p_.steps - 1 ? upstream + k : slopes[s];
        step_back(p_.step[s], from, registers, values[s], run, target, sums);
      }
      if (p_.steps == 0) __builtin_memcpy(pull, upstream + k, run * sizeof(T));
      for (int64_t i = 0; i < run; i += kLanes<T>) store(weights + k + i, load(pull + i) * splat<T>(factor));
    }
  }

 private:
  static void clear(T* out, int64_t run) {
    for (int64_t i = 0; i < run; ++i) out[i] = 0;
  }

  const T* evaluate(T* const* tiles, int64_t k, int64_t run, T (*values)[kRun], const T** registers) const {
    for (int s = 0; s < p_.scores; ++s) registers[s] = tiles[s] + k;
    for (int s = 0; s < p_.steps; ++s) {
      const ProgramStep& step = p_.step[s];
      const bool two = step.kind == StepKind::add || step.kind == StepKind::multiply;
      run_step(step, registers[step.left], two ? registers[step.right] : nullptr, run, values[s]);
      registers[p_.scores + s] = values[s];
    }
    return registers[p_.scores + p_.steps - 1];
  }

  void run_step(const ProgramStep& step, const T* a, const T* b, int64_t run, T* out) const {
    if (step.kind == StepKind::add) {
      for (int64_t i = 0; i < run; i += kLanes<T>) store(out + i, load(a + i) + load(b + i));
    } else if (step.kind == StepKind::multiply) {
      for (int64_t i = 0; i < run; i += kLanes<T>) store(out + i, load(a + i) * load(b + i));
    } else {
      with_step<T>(step, parameter_ + step.right, [&](auto map) {
        for (int64_t i = 0; i < run; i += kLanes<T>) store(out + i, map.value(load(a + i)));
      });
    }
  }

  template <class Target>
  void step_back(const ProgramStep& step, const T* from, const T* const* registers, const T* value, int64_t run,
                 Target target, double* sums) const {
    const T* a = registers[step.left];
    T* to = target(step.left);
    if (step.kind == StepKind::add || step.kind == StepKind::multiply) {
      const bool sum = step.kind == StepKind::add;
      const T* b = registers[step.right];
      if (to)
        for (int64_t i = 0; i < run; i += kLanes<T>)
          store(to + i, load(to + i) + (sum ? load(from + i) : load(from + i) * load(b + i)));
      T* other = target(step.right);
      if (other)
        for (int64_t i = 0; i < run; i += kLanes<T>)
          store(other + i, load(other + i) + (sum ? load(from + i) : load(from + i) * load(a + i)));
      return;
    }
    with_step<T>(step, parameter_ + step.right, [&](auto map) {
      if (to)
        for (int64_t i = 0; i < run; i += kLanes<T>)
          store(to + i, load(to + i) + load(from + i) * map.slope(load(a + i), load(value + i)));
      for (int p = 0; sums && p < map.kParameters; ++p) {
        Vec<T> sum = Vec<T>{};
        for (int64_t i = 0; i < run; i += kLanes<T>) sum += load(from + i) * map.by(p, load(a + i), load(value + i));
        sums[step.right + p] += static_cast<double>(hsum<T>(sum));
      }
    });
  }

  const Program& p_;
  T parameter_[Program::kParameters];
};

/// W = upstream * pull of one of the scores. `upstream(block, panel, out)` fills a tile of the upstream gradient of the
/// kernel's values, 0 where there is no pair.
template <class T, class Upstream>
struct ProgramGradCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;

  ProgramGradCell(const Scores<T>& scores, const Program& program, int score, const Upstream& upstream, double* sums)
      : scores_(scores),
        evaluator_(program),
        score_(score),
        parameters_(sums ? program.parameters : 0),
        upstream_(upstream),
        sums_(sums),
        chunk_sums_(scores.chunks().count * parameters_) {
    for (int64_t k = 0; k < scores.chunks().count * parameters_; ++k) chunk_sums_[k] = 0;
  }

  void map(const Block<T>& b) {
    const int64_t size = b.columns * P::NR;
    Buffer<T> rows(scores_.row_buffer()), panel(scores_.packed()), squares(scores_.squares());
    Buffer<T> upstream(size), others(scores_.count * size);
    T* tiles[Program::kScores];
    double* sums = parameters_ ? chunk_sums_.get() + b.chunk * parameters_ : nullptr;
    for (int64_t p = 0; p < b.panels; ++p) {
      for (int s = 0; s < scores_.count; ++s) tiles[s] = s == score_ ? b.panel(p) : others.get() + s * size;
      if (scores_.count > 1) {
        const int64_t row = b.row + p * P::NR;
        scores_.pack(row, rows.get(), panel.get(), squares.get());
        scores_.block(b.column / P::MR, (b.column + b.columns) / P::MR, row, panel.get(), squares.get(), tiles, score_);
      }
      upstream_(b, p, upstream.get());
      evaluator_.reverse(tiles, upstream.get(), size, score_, b.panel(p), sums);
    }
  }
  void close(int64_t, int64_t, int64_t) {}
  const T* factor(int64_t) const { return nullptr; }

  /// Chunks in order, so that the sums do not depend on the number of threads.
  void finish() {
    for (int64_t c = 0; c < scores_.chunks().count; ++c)
      for (int k = 0; k < parameters_; ++k) sums_[k] += chunk_sums_[c * parameters_ + k];
  }

 private:
  const Scores<T>& scores_;
  const Evaluator<T> evaluator_;
  const int score_, parameters_;
  const Upstream& upstream_;
  double* sums_;
  Buffer<double> chunk_sums_;
};

/// Adds to dx (n, d) and dy (m, d), either of which may be null, the gradient of sum_ij u_ij k(x_i, y_j), and to sums
/// that of the parameters, null if not wanted. One pass a score: its products need weights of their own.
template <class T, class Upstream>
void program_gradient(const Program& program, const Rows& x, const Rows& y, const Upstream& upstream, T* dx, T* dy,
                      double* sums, int threads) {
  const Scores<T> scores(program, x, y, false, true, threads);
  for (int s = 0; s < scores.count; ++s) {
    const Operands<T>& o = scores[s];
    ProgramGradCell<T, Upstream> cell(scores, program, s, upstream, s == 0 ? sums : nullptr);
    StripPlan<T> plan;
    plan.threads = threads;
    const bool whole = scores.count == 1 && o.d == x.d;
    Buffer<T> own_dx(dx && !whole ? x.n * o.d : 0), own_dy(dy && !whole ? y.n * o.d : 0);
    for (int64_t k = 0; dx && !whole && k < x.n * o.d; ++k) own_dx[k] = 0;
    for (int64_t k = 0; dy && !whole && k < y.n * o.d; ++k) own_dy[k] = 0;
    plan.dx = whole || !dx ? dx : own_dx.get();
    plan.dy = whole || !dy ? dy : own_dy.get();
    StripPass<T, ProgramGradCell<T, Upstream>>(o, cell, plan).run();
    cell.finish();
    if (whole) continue;
    auto add = [&](const T* from, T* to, int64_t rows, int64_t width) {
      for (int64_t i = 0; to && i < rows; ++i)
        for (int64_t k = 0; k < o.d; ++k) to[i * width + program.score[s].begin + k] += from[i * o.d + k];
    };
    add(own_dx.get(), dx, x.n, x.d);
    add(own_dy.get(), dy, y.n, y.d);
    if (!dx && !dy) break;
  }
}

}  // namespace
}  // namespace nearfar
