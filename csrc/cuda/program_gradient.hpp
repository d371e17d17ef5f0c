// Gradients through a kernel given as a program: upstream gradients of its values become pulls of its scores, in the
// place of these, and strips multiply them with the points.
#pragma once

#include "cuda/finish.hpp"
#include "cuda/program.hpp"

namespace nearfar {
inline namespace device {

/// What pairs add to the gradients of parameters: the sums of a thread, then one of every block of threads, at
/// (parameter, block). parts null: not wanted.
struct ParameterSums {
  double* parts;
  int count;

  NEARFAR_DEVICE double* begin(double* sums) const {
    for (int p = 0; parts && p < count; ++p) sums[p] = 0;
    return parts ? sums : nullptr;
  }
  NEARFAR_DEVICE void end(const double* sums) const {
    for (int p = 0; parts && p < count; ++p) {
      const double sum = block_sum(sums[p]);
      if (cuda::thread_index() == 0) parts[p * cuda::block_count() + cuda::block_index()] = sum;
    }
  }
};

/// Upstream gradients times the pull of every score, in the place of the score.
template <class T>
struct ReversePairs {
  PairScores<T> pairs;
  Weights<T> upstream;
  int64_t n, m;
  ParameterSums parameters;

  NEARFAR_DEVICE void operator()() const {
    double room[Program::kParameters];
    double* sums = parameters.begin(room);
    for_pairs(pairs.score[0].block, [&](int64_t i, int64_t j) {
      if (i >= n || j >= m) return pairs.clear(i, j);
      T registers[PairScores<T>::kRegisters];
      pairs.value(i, j, registers);
      pairs.pull(i, j, registers, upstream.at(i, j), sums);
    });
    parameters.end(room);
  }
};

/// A block a parameter.
struct AddParameterSums {
  const double* parts;
  int64_t count;
  double times;
  double* out;
  NEARFAR_DEVICE void operator()() const {
    const int64_t p = cuda::block_index();
    const double sum = OrderedSum{parts + p * count, count}();
    if (cuda::thread_index() == 0) out[p] += times * sum;
  }
};

/// Columns of a gradient, which a score reads, into the whole.
template <class T>
struct AddColumns {
  const T* from;
  int64_t count, d;
  T* to;
  int64_t width;
  NEARFAR_DEVICE void operator()() const {
    const int64_t at = cuda::global_thread();
    if (at < count) to[at / d * width + at % d] += from[at];
  }
};

/// The gradient of a sum of weighted pairs of a kernel, added to dx, dy and dparameters, null if not wanted: block by
/// block `open`, something that leaves pulls in the place of the scores, `close`; then `finish`.
template <class T>
class ProgramGradient {
 public:
  /// same: as for PackedProgram.
  ProgramGradient(cuda::Context& c, const Program& text, const double* parameters_at, const Rows& x, const Rows& y,
                  bool same, T* dx, T* dy, double* dparameters)
      : kernel(c, text, parameters_at, x, y, same, true),
        c_(c),
        text_(text),
        d_(x.d),
        dx_(dx),
        dy_(dy),
        dparameters_(dparameters) {
    for (int s = 0; s < kernel.program.scores; ++s) {
      const Pairs<T, T>& pairs = kernel[s];
      Part& part = parts_[s];
      // dX is computed in any case; where it is not wanted, or not all of it, aside.
      if (points()) part.dx = room(dx, pairs.scores.x);
      if (dy) part.dy = room(dy, pairs.scores.y);
      const bool multiplies = !kernel.by_coordinates(s);
      part.strip.emplace(c, pairs, false, true, multiplies ? part.dx : nullptr, multiplies ? part.dy : nullptr);
    }
    const StripShape& shape = this->shape();
    if (dparameters) sums_ = c.take<double>(pair_blocks({0, shape.rows, 0, shape.columns}) * kernel.program.parameters);
  }

  bool wanted() const { return points() || dparameters_; }
  const StripShape& shape() const { return parts_[0].strip->shape; }
  ParameterSums parameters() const { return {sums_, kernel.program.parameters}; }
  template <class F>
  void for_blocks(F f) const {
    shape().for_blocks(kernel[0].x.padded, kernel[0].y.padded, f);
  }

  /// Room for the scores of a block.
  PairScores<T> open(const Block& block) {
    PairScores<T> pairs{kernel.program, {}};
    for (int s = 0; s < kernel.program.scores; ++s) {
      pairs.score[s] = parts_[s].strip->open(block);
      parts_[s].strip->clear_near(pairs.score[s]);
    }
    return pairs;
  }
  void put_scores(const PairScores<T>& pairs) const {
    for (int s = 0; s < kernel.program.scores; ++s) kernel.put_scores(s, pairs.score[s]);
  }
  /// Of the pulls in `pairs` the products, and what the pairs left for the parameters, times `times`.
  void close(const PairScores<T>& pairs, double times = 1) {
    const int count = kernel.program.parameters;
    if (sums_) c_.launch(count, AddParameterSums{sums_, pair_blocks(pairs.score[0].block), times, dparameters_});
    for (int s = 0; points() && s < kernel.program.scores; ++s)
      kernel.products(s, *parts_[s].strip, pairs.score[s], parts_[s].dx, parts_[s].dy);
  }
  void finish() {
    for (int s = 0; s < kernel.program.scores; ++s) {
      const int64_t begin = text_.score[s].begin;
      auto add = [&](T* from, T* to, const Source<T>& source) {
        if (!to || from == to) return;
        if (source.inverse) finish_rows(c_, source, from, FinishRows<T>{{}, nullptr, {}, nullptr, 1, nullptr});
        const int64_t d = source.rows.d, count = source.rows.n * d;
        c_.launch_threads(count, AddColumns<T>{from, count, d, to + begin, d_});
      };
      add(parts_[s].dx, dx_, kernel[s].scores.x);
      add(parts_[s].dy, dy_, kernel[s].scores.y);
    }
  }

  const PackedProgram<T> kernel;

 private:
  struct Part {
    T *dx = nullptr, *dy = nullptr;
    std::optional<Strip<T, T>> strip;
  };
  bool points() const { return dx_ || dy_; }
  /// The whole, if that is what the score's part is and nothing is left to do with it.
  T* room(T* whole, const Source<T>& source) {
    if (whole && source.rows.d == d_ && !source.inverse) return whole;
    const int64_t count = source.rows.n * source.rows.d;
    T* own = c_.take<T>(count);
    c_.launch_threads(count, Fill<T>{own, count, T(0)});
    return own;
  }

  cuda::Context& c_;
  const Program& text_;
  const int64_t d_;
  T *dx_, *dy_;
  double *dparameters_, *sums_ = nullptr;
  Part parts_[Program::kScores];
};

/// The gradient of sum_ij u_ij k(x_i, y_j), that of the parameters times `times`. upstream(room) are the u of the block
/// of `room`, which they may be put into.
template <class T, class Upstream>
void program_gradient(cuda::Context& c, const Program& text, const double* parameters_at, const Rows& x, const Rows& y,
                      T* dx, T* dy, double* dparameters, bool needs_room, Upstream upstream, double times = 1) {
  ProgramGradient<T> gradient(c, text, parameters_at, x, y, false, dx, dy, dparameters);
  const PackedProgram<T>& kernel = gradient.kernel;
  const bool gaussian = kernel.program.is_gaussian() && !dparameters;
  Weights<T> aside{nullptr, nullptr, gradient.shape().columns, {}};
  if (needs_room && !gaussian) aside.w = c.take<T>(gradient.shape().rows * gradient.shape().columns);
  gradient.for_blocks([&](const Block& block) {
    const PairScores<T> pairs = gradient.open(block);
    if (gaussian) {
      kernel.gaussian_pulls(pairs.score[0], upstream(pairs.score[0]));
    } else {
      aside.block = block;
      const Weights<T> given = upstream(aside);
      gradient.put_scores(pairs);
      c.launch(pair_blocks(block), ReversePairs<T>{pairs, given, kernel.n, kernel.m, gradient.parameters()});
    }
    gradient.close(pairs, times);
  });
  gradient.finish();
}

}  // namespace device
}  // namespace nearfar
