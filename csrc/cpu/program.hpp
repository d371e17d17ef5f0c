// Programs on blocks: all scores of a program for a block of pairs, its value, and by a reverse sweep the slope of the
// value by every score and the sums for the gradients of the parameters.
//
// A block is worked through in runs that stay in L1 with all their registers, so the switch on a step's kind costs once
// a run and what a step leaves is read from L1. Registers are in the workspace: the most that a program may have are
// 272 KiB, more than the whole stack of a thread where OMP_STACKSIZE says so.
#pragma once

#include <new>

#include "cpu/strip.hpp"

namespace nearfar {
namespace {

/// An object for every score of a program, or of the N / kScores programs of an operation, made one after the other.
template <class Item, int N = Program::kScores>
class PerScore {
 public:
  PerScore() = default;
  ~PerScore() {
    while (made_ > 0) (*this)[--made_].~Item();
  }
  PerScore(const PerScore&) = delete;
  PerScore& operator=(const PerScore&) = delete;

  template <class... A>
  Item& add(A&&... arguments) {
    Item* item = new (memory_ + made_ * sizeof(Item)) Item(static_cast<A&&>(arguments)...);
    ++made_;
    return *item;
  }
  Item& operator[](int s) const {
    return *std::launder(reinterpret_cast<Item*>(const_cast<unsigned char*>(memory_) + s * sizeof(Item)));
  }

 private:
  int made_ = 0;
  alignas(64) unsigned char memory_[N * sizeof(Item)];
};

/// The pairs of point sets that a program's scores read, packed. All have the same rows, so the same tiles and chunks.
template <class T>
class Scores {
  using P = Policy<T>;

 public:
  /// same: y is x. products: as for Operands.
  Scores(const Program& program, const Rows& x, const Rows& y, bool same, bool products, int threads)
      : count(program.scores), program_(program), same_(same) {
    for (int k = 0; k < count; ++k) {
      const ProgramScore& s = program.score[k];
      const Operands<T>& made = operands_.add(columns_of(x, s), columns_of(y, s), s.kind == ScoreKind::unit_dot,
                                              s.kind == ScoreKind::sqeuclidean, products, threads, s.kind);
      depth_ += made.d;
      widest_ = widest_ < made.d ? made.d : widest_;
    }
  }

  Operands<T>& operator[](int s) const { return operands_[s]; }
  const Chunks& chunks() const { return (*this)[0].chunks; }

  // Sizes of what `pack` fills for a panel of NR rows of x, and of its workspace.
  int64_t packed() const { return P::NR * depth_; }
  int64_t squares() const { return P::NR * count; }
  int64_t row_buffer() const { return P::NR * padded<T>(widest_); }
  int64_t widest() const { return widest_; }

  void pack(int64_t i0, T* rows, T* panel, T* squares) const {
    for (int s = 0; s < count; ++s) {
      (*this)[s].pack_panel(i0, T(1), rows, panel, squares + s * P::NR);
      panel += P::NR * (*this)[s].d;
    }
  }

  /// tiles[s] = score s of tiles [t0, t1) against a packed panel.
  void block(int64_t t0, int64_t t1, int64_t i0, const T* panel, const T* squares, T* const* tiles) const {
    for (int s = 0; s < count; ++s) {
      const Operands<T>& o = (*this)[s];
      o.block(t0, t1, i0, panel, squares + s * P::NR, tiles[s]);
      if (same_ && program_.score[s].kind == ScoreKind::unit_dot) mend_diagonal(t0, t1, i0, tiles[s]);
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

  const Program& program_;
  const bool same_;
  int64_t depth_ = 0, widest_ = 0;
  PerScore<Operands<T>> operands_;
};

template <class T>
class Evaluator {
 public:
  static constexpr int64_t kRun = 2048 / static_cast<int64_t>(sizeof(T));
  using Run = T[kRun];

  explicit Evaluator(const Program& program) : p_(program) {
    for (int k = 0; k < p_.parameters; ++k) parameter_[k] = parameter_of<T>(p_.parameter[k]);
  }

  /// What a run needs: the values of the steps, and where their slopes and those of the scores are summed.
  struct Sweep {
    explicit Sweep(const Program& p) : memory(p.scores + 2 * p.steps), values(memory.get()), slopes(values + p.steps) {}
    const Buffer<Run> memory;
    Run *const values, *const slopes;
    const T* registers[Program::kScores + Program::kSteps];
  };
  Sweep sweep() const { return Sweep(p_); }

  /// out[k] = the program's value for k < count, whole vectors; `out` may be one of the tiles.
  void forward(T* const* tiles, int64_t count, T* out) const {
    if (p_.steps == 1 && p_.scores == 1) return run_step(p_.step[0], tiles[0], tiles[0], count, out);
    Sweep sweep(p_);
    for (int64_t k = 0; k < count; k += kRun) {
      const int64_t run = count - k < kRun ? count - k : kRun;
      const T* last = evaluate(tiles, k, run, sweep);
      if (last != out + k) __builtin_memcpy(out + k, last, run * sizeof(T));
    }
  }

  /// The values of one run, from k on, in a register of the sweep.
  const T* evaluate(T* const* tiles, int64_t k, int64_t run, Sweep& sweep) const {
    const T** registers = sweep.registers;
    for (int s = 0; s < p_.scores; ++s) registers[s] = tiles[s] + k;
    for (int s = 0; s < p_.steps; ++s) {
      const ProgramStep& step = p_.step[s];
      const bool two = step.kind == StepKind::add || step.kind == StepKind::multiply;
      run_step(step, registers[step.left], two ? registers[step.right] : nullptr, run, sweep.values[s]);
      registers[p_.scores + s] = sweep.values[s];
    }
    return registers[p_.scores + p_.steps - 1];
  }

  /// The same run after `evaluate`: tiles[s][k + i] becomes upstream[i] * d value / d score s, as a pull: twice that
  /// for squared distances. Adds sum_i upstream[i] * d value / d parameter to `sums`, if that is not null. Inlined in
  /// the pass it took 3 % longer.
  __attribute__((noinline)) void pull(T* const* tiles, const T* upstream, int64_t k, int64_t run, const Sweep& sweep,
                                      double* sums) const {
    Run* const slopes = sweep.slopes;
    bool met[Program::kScores + Program::kSteps] = {};
    // Where a register's slope is summed.
    auto target = [&](int r) {
      if (!met[r]) clear(slopes[r], run);
      met[r] = true;
      return slopes[r];
    };
    for (int s = p_.steps - 1; s >= 0; --s) {
      const bool last = s == p_.steps - 1;
      if (!last && !met[p_.scores + s]) continue;  // nothing reads it
      const T* from = last ? upstream : slopes[p_.scores + s];
      step_back(p_.step[s], from, sweep.registers, sweep.values[s], run, target, sums);
    }
    for (int s = 0; s < p_.scores; ++s) {
      const T* slope = p_.steps == 0 ? upstream : target(s);
      const T factor = p_.score[s].kind == ScoreKind::sqeuclidean ? T(2) : T(1);
      // Where a tiny length scale lets the pull of coincident points overflow, the largest number stands for
      // infinity: it meets the difference 0. NaN comes through.
      constexpr T kMost = std::numeric_limits<T>::max();
      for (int64_t i = 0; i < run; i += kLanes<T>)
        store(tiles[s] + k + i, vmax(splat<T>(-kMost), vmin(splat<T>(kMost), load(slope + i) * splat<T>(factor))));
    }
  }

 private:
  static void clear(T* out, int64_t run) {
    for (int64_t i = 0; i < run; ++i) out[i] = 0;
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
      for (int64_t i = 0; i < run; i += kLanes<T>)
        store(to + i, load(to + i) + (sum ? load(from + i) : load(from + i) * load(b + i)));
      T* other = target(step.right);
      for (int64_t i = 0; i < run; i += kLanes<T>)
        store(other + i, load(other + i) + (sum ? load(from + i) : load(from + i) * load(a + i)));
      return;
    }
    with_step<T>(step, parameter_ + step.right, [&](auto map) {
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

/// Gradients of a program's parameters while chunks of columns go by in any order; null if they are not wanted.
class ParameterSums {
 public:
  ParameterSums(double* totals, const Program& program, int64_t chunks)
      : totals_(totals), size_(totals ? program.parameters : 0), chunks_(chunks), sums_(chunks * size_) {
    for (int64_t k = 0; k < chunks * size_; ++k) sums_[k] = 0;
  }
  explicit operator bool() const { return size_ > 0; }
  double* of(int64_t chunk) const { return size_ ? sums_.get() + chunk * size_ : nullptr; }
  /// Chunks in order, so that the totals do not depend on the number of threads.
  void finish() const {
    for (int64_t chunk = 0; chunk < chunks_; ++chunk)
      for (int k = 0; k < size_; ++k) totals_[k] += sums_[chunk * size_ + k];
  }

 private:
  double* const totals_;
  const int size_;
  const int64_t chunks_;
  const Buffer<double> sums_;
};

/// Weights of every score: upstream * pull. `upstream(block, panel, columns, out)` fills a tile of the upstream
/// gradient of the kernel's values, 0 where there is no pair. Where y is x only the triangle column <= row is asked
/// for: a pair of it stands for both, and the diagonal for itself.
template <class T, class Upstream>
struct ProgramGradCell {
  using P = Policy<T>;
  static constexpr bool kScores = true;

  ProgramGradCell(const Scores<T>& scores, const Program& program, bool same, const Upstream& upstream, double* sums)
      : count_(scores.count),
        same_(same),
        evaluator_(program),
        upstream_(upstream),
        sums_(sums, program, scores.chunks().count) {}

  /// blocks[s]: score s of the same pairs.
  void map(const Block<T>* blocks) {
    const Block<T>& b = blocks[0];
    Buffer<T> upstream(b.columns * P::NR);
    T* tiles[Program::kScores];
    auto sweep = evaluator_.sweep();
    for (int64_t p = 0; p < b.panels; ++p) {
      const int64_t columns = same_ ? b.columns_below(p) : b.columns, size = columns * P::NR;
      for (int s = 0; s < count_; ++s) tiles[s] = blocks[s].panel(p);
      upstream_(b, p, columns, upstream.get());
      for (int64_t k = 0; k < size; k += Evaluator<T>::kRun) {
        const int64_t run = size - k < Evaluator<T>::kRun ? size - k : Evaluator<T>::kRun;
        evaluator_.evaluate(tiles, k, run, sweep);
        evaluator_.pull(tiles, upstream.get() + k, k, run, sweep, sums_.of(b.chunk));
      }
      for (int s = 0; s < count_; ++s)
        for (int64_t k = size; k < b.columns * P::NR; ++k) tiles[s][k] = 0;
    }
  }
  void close(int64_t, int64_t, int64_t) {}

  void finish() const { sums_.finish(); }

 private:
  const int count_;
  const bool same_;
  const Evaluator<T> evaluator_;
  const Upstream& upstream_;
  const ParameterSums sums_;
};

/// One-phase strip passes over the same rows and columns, one a score, in step: the cell sees the blocks of all scores
/// side by side and leaves the weights of each, which has products of its own.
struct InStep {
  template <class T, class Cell, int N>
  static void run(const PerScore<StripPass<T, Cell>, N>& passes, int count, Cell& cell) {
    using P = Policy<T>;
    const StripPass<T, Cell>& first = passes[0];
    const int threads = first.plan_.threads;
    const int64_t n = first.n_;
    for (int64_t row = 0; row < n; row += P::kStripRows) {
      const int64_t rows = n - row < P::kStripRows ? n - row : P::kStripRows, panels = ceil_div(rows, P::NR);
      const int64_t chunks = first.chunks_of(first.o_, first.plan_.triangle, row + rows);
      const int64_t groups = ceil_div(chunks, first.chunks_each_);
      parallel_for(count * panels, threads,
                   [&](int64_t task, int) { passes[static_cast<int>(task / panels)].pack_rows(row, task % panels); });
      parallel_for(groups, threads, [&](int64_t group, int worker) {
        passes[0].for_chunks(group, chunks, [&](int64_t chunk) {
          Block<T> blocks[N];
          for (int s = 0; s < count; ++s) blocks[s] = passes[s].scores(row, panels, chunk, group, worker);
          cell.map(blocks);
          for (int s = 0; s < count; ++s)
            if (passes[s].products_) passes[s].multiply_weights(blocks[s], nullptr, worker);
        });
      });
      cell.close(row, rows, chunks);
      for (int s = 0; groups > 0 && s < count; ++s)
        if (passes[s].plan_.dx)
          parallel_for(panels, threads, [&](int64_t p, int) { passes[s].merge(row, rows, p, groups); });
    }
    for (int s = 0; s < count; ++s)
      if (passes[s].plan_.dy && passes[s].o_.distance()) passes[s].finish_columns();
  }
};

/// The passes of one program's scores, to go in step with those of others, and what they add to dx (n, d) and dy (m, d)
/// of all columns, either of which may be null, and dy may be dx.
template <class T, class Cell>
class ScorePasses {
 public:
  template <int N>
  ScorePasses(const Program& program, const Scores<T>& scores, int64_t d, T* dx, T* dy, Cell& cell, StripPlan<T> plan,
              PerScore<StripPass<T, Cell>, N>& passes)
      : program_(program),
        scores_(scores),
        d_(d),
        dx_(dx),
        dy_(dy),
        whole_(scores.count == 1 && scores[0].d == d && !scores[0].x.normalized()),
        threads_(plan.threads) {
    for (int s = 0; s < scores.count; ++s) {
      plan.dx = room(dx, whole_, own_dx_[s], scores[s].x);
      plan.dy = room(dy, whole_ && dy != dx, own_dy_[s], scores[s].y);
      passes.add(scores[s], cell, plan);
    }
  }

  void finish() {
    for (int s = 0; s < scores_.count; ++s) {
      add(s, own_dx_[s].get(), dx_, scores_[s].x);
      add(s, own_dy_[s].get(), dy_, scores_[s].y);
    }
  }

 private:
  /// One score of all columns adds to the results; several, or one of some columns or of unit rows, to memory of their
  /// own.
  T* room(T* result, bool whole, Buffer<T>& own, const Source<T>& rows) const {
    if (!result || whole) return result;
    const int64_t size = rows.n() * rows.d();
    own = Buffer<T>(size);
    for (int64_t k = 0; k < size; ++k) own[k] = 0;
    return own.get();
  }
  void add(int s, T* from, T* to, const Source<T>& rows) const {
    if (!from) return;
    if (rows.normalized()) finish_gradient(rows, 1, threads_, from);
    const int64_t width = rows.d(), begin = program_.score[s].begin;
    for (int64_t i = 0; i < rows.n(); ++i)
      for (int64_t k = 0; k < width; ++k) to[i * d_ + begin + k] += from[i * width + k];
  }

  const Program& program_;
  const Scores<T>& scores_;
  const int64_t d_;
  T *const dx_, *const dy_;
  const bool whole_;
  const int threads_;
  Buffer<T> own_dx_[Program::kScores], own_dy_[Program::kScores];
};

/// What `plan.depth` is for scores of at most so many columns.
template <class T>
int64_t depth_of(int64_t widest) {
  return ceil_div(widest, Policy<T>::MR) * Policy<T>::MR;
}

/// Adds to dx (n, d) and dy (m, d), either of which may be null, the gradient of sum_ij u_ij k(x_i, y_j), and to sums
/// that of the parameters, null if not wanted. same: y is x, and dy dx.
template <class T, class Upstream>
void program_gradient(const Program& program, const Rows& x, const Rows& y, bool same, const Upstream& upstream, T* dx,
                      T* dy, double* sums, int threads) {
  using Cell = ProgramGradCell<T, Upstream>;
  const Scores<T> scores(program, x, y, same, true, threads);
  Cell cell(scores, program, same, upstream, sums);
  StripPlan<T> plan;
  plan.triangle = same;
  plan.threads = threads;
  plan.depth = depth_of<T>(scores.widest());
  plan.scored = !sums && program.linear();
  for (int s = 0; s < scores.count; ++s) plan.scored &= !scores[s].distance();  // their blocks find near pairs too
  PerScore<StripPass<T, Cell>> passes;
  ScorePasses<T, Cell> own(program, scores, x.d, dx, dy, cell, plan, passes);
  InStep::run(passes, scores.count, cell);
  cell.finish();
  own.finish();
}

}  // namespace
}  // namespace nearfar
