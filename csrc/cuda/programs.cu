// Programs on blocks of pairs: the kernels that every operation on a kernel's matrix shares.
#include "cuda/program.hpp"

namespace nearfar {
inline namespace device {

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

/// Upstream gradients times the pull of the Gaussian. They may lie where the result goes.
template <class T>
struct PutGaussianPull {
  const T* parameter;
  Weights<T> upstream;
  struct Put {
    GaussianStep<T> step;
    const Weights<T>& upstream;
    NEARFAR_DEVICE T operator()(int64_t i, int64_t j, T score) const {
      return finite(upstream.at(i, j) * (2 * step.slope(score, step.value(score))));
    }
  };
  NEARFAR_DEVICE Put begin() const { return {GaussianStep<T>(parameter), upstream}; }
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

template <class T, class Put>
void put_pairs(cuda::Context& c, const char* operation, const Pairs<T, T>& pairs, const Weights<T>& out, bool outside,
               const Put& put) {
  launch_scores(c, plan_scores(c, operation, pairs, out.block), pairs, out.block,
                ProgramEpilogue<T, Put>{pairs.scores, out, pairs.x.n, pairs.y.n, outside, put});
}
constexpr const char* kScoresOfKernel = "scores of a kernel";

// ---- from the scores -----------------------------------------------------------------------------------------------

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
void put_scores(cuda::Context& c, const char* operation, const Pairs<T, T>& pairs, const Weights<T>& out) {
  put_pairs(c, operation, pairs, out, false, PutScore<T>{false});
}

template <class T>
PackedProgram<T>::PackedProgram(cuda::Context& c, const Program& text, const double* parameters_at, const Rows& x,
                                const Rows& y, bool same, bool products)
    : program(c, text, parameters_at), n(x.n), m(y.n), c_(c) {
  for (int s = 0; s < text.scores; ++s) {
    const ProgramScore& score = text.score[s];
    kind_[s] = score.kind;
    pairs_[s].emplace(c, columns_of(x, score), columns_of(y, score), score.kind == ScoreKind::unit_dot,
                      program.square[s], products, false, by_coordinates(s) ? PairUse::rows : PairUse::scores);
    mend_[s] = same && score.kind == ScoreKind::unit_dot;
  }
}

template <class T>
void PackedProgram<T>::put_scores(int s, const Weights<T>& out) const {
  const PutScore<T> score{mend_[s]};
  if (!by_coordinates(s)) return put_pairs(c_, kScoresOfKernel, *pairs_[s], out, false, score);
  with_coordinate_score(kind_[s], [&](auto of_pair) {
    launch_coordinates(c_, of_pair, *pairs_[s], out.block,
                       ProgramEpilogue<T, PutScore<T>>{pairs_[s]->scores, out, n, m, false, score});
  });
}

template <class T>
void PackedProgram<T>::gaussian_pulls(const Weights<T>& out, const Weights<T>& upstream) const {
  put_pairs(c_, kScoresOfKernel, *pairs_[0], out, true, PutGaussianPull<T>{program.parameter, upstream});
}

template <class T>
void PackedProgram<T>::products(int s, Strip<T, T>& strip, const Weights<T>& weights, T* dx, T* dy) const {
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

template <class T>
void PackedProgram<T>::take_others(const StripShape& shape) {
  for (int s = 1; s < program.scores; ++s)
    others_[s] = {c_.take<T>(shape.rows * shape.columns), nullptr, shape.columns, {}};
}

template <class T>
void PackedProgram<T>::values(const Weights<T>& out, bool outside) const {
  if (program.is_gaussian())
    return put_pairs(c_, kScoresOfKernel, *pairs_[0], out, outside, PutGaussian<T>{program.parameter});
  EvaluatePairs<T> evaluate{{program, {out}}, n, m, outside};
  for (int s = 0; s < program.scores; ++s) {
    Weights<T>& score = evaluate.pairs.score[s];
    if (s > 0) score = others_[s];
    score.block = out.block;
    put_scores(s, score);
  }
  if (program.steps > 0 || outside) c_.launch(pair_blocks(out.block), evaluate);
}

#define NEARFAR_PROGRAMS(T)                                                                        \
  template void put_scores<T>(cuda::Context&, const char*, const Pairs<T, T>&, const Weights<T>&); \
  template class PackedProgram<T>;
NEARFAR_PROGRAMS(float)
NEARFAR_PROGRAMS(double)

}  // namespace device
}  // namespace nearfar
