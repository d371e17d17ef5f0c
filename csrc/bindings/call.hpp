// What every binding shares: rows from arrays, the compute type from a dtype, and a body that runs without the GIL.
#pragma once

#include "bindings/array.hpp"
#include "cpu/ops.hpp"
#include "cpu/threads.hpp"

namespace nearfar {

/// A matrix of a batch: the last two axes of a 3-d array at index `batch`, or a 2-d array.
inline Rows rows_of(const Array& a, int64_t batch = 0) {
  const int first = a.ndim - 2;
  Rows rows;
  rows.data = static_cast<const char*>(a.data) + (first ? batch * a.strides[0] * size_of(a.dtype) : 0);
  rows.n = a.shape[first];
  rows.d = a.shape[first + 1];
  rows.row_stride = a.strides[first];
  rows.col_stride = a.strides[first + 1];
  rows.dtype = a.dtype;
  return rows;
}

/// The one switch from dtype to compute type: calls f(float{}) or f(double{}).
template <class F>
auto with_compute_type(DType dtype, F f) {
  return dtype == DType::f64 ? f(double{}) : f(float{});
}

inline void require_shape(const Array& a, const char* name, std::initializer_list<int64_t> shape) {
  int k = 0;
  bool same = a.ndim == static_cast<int>(shape.size());
  for (int64_t extent : shape) same = same && a.shape[k++] == extent;
  if (!same)
    refuse_value(name,
                 "expected shape " + text_of(shape.begin(), static_cast<int>(shape.size())) + ", got " + shape_of(a));
}

inline void require_dtype(const Array& a, const char* name, DType dtype) {
  if (a.dtype != dtype) refuse_type(name, std::string("expected ") + name_of(dtype) + ", got " + name_of(a.dtype));
}

/// Multiply-adds of all pairs of rows of x and y, of one pair of matrices of a batch.
inline double work_of(const Array& x, const Array& y) {
  return static_cast<double>(x.shape[x.ndim - 2]) * static_cast<double>(y.shape[y.ndim - 2]) *
         static_cast<double>(x.shape[x.ndim - 1]);
}

/// x and y as (batch, rows, depth) of one dtype and depth.
struct PairInputs {
  Array x, y;
  PairInputs(py::handle x_, py::handle y_) : x(input(x_, "x", 3)), y(input(y_, "y", 3)) {
    require_dtype(y, "y", x.dtype);
    require_shape(y, "y", {x.shape[0], y.shape[1], x.shape[2]});
  }
  int64_t batches() const { return x.shape[0]; }
  int64_t n() const { return x.shape[1]; }
  int64_t m() const { return y.shape[1]; }
  int64_t d() const { return x.shape[2]; }
  double work() const { return work_of(x, y); }
  int64_t results(bool condensed) const { return condensed ? n() * (n() - 1) / 2 : n() * m(); }
};
/// Of a gradient where y is x: there is one of both.
template <class Inputs>
void require_same(const Inputs& in, py::handle dy) {
  if (in.n() != in.m()) refuse_value("y", "expected the rows of x");
  if (!dy.is_none()) refuse_value("dy", "expected None, since y is x");
}

/// Weights of n rows, or null.
template <class T>
const T* weights_of(py::handle weights, int64_t n) {
  return weights.is_none() ? nullptr : output<T>(weights, "weights", {n});
}

/// While it lives, the GIL is released and threads stand by: as many as are allowed and worth waking.
class Team {
  static constexpr double kSmall = 2e5;  // multiply-adds in less than the wake-up of a thread

 public:
  const int threads;
  Team(int allowed, double work) : threads(work < kSmall ? 1 : allowed), stand_by_(threads) {}

 private:
  py::gil_scoped_release release_;
  StandBy stand_by_;
};

/// f(batch, threads) for every batch: batches side by side where one alone would not fill the threads.
template <class F>
void for_batches(int64_t batches, double work, int threads, F f) {
  constexpr double kSmall = 1e7;  // multiply-adds that are not worth a second thread's wake-up many times over
  if (batches > 1 && work < kSmall) {
    parallel_for(batches, threads, [&](int64_t batch, int) { f(batch, 1); });
  } else {
    for (int64_t batch = 0; batch < batches; ++batch) f(batch, threads);
  }
}

/// The same for an operation that takes several problems, `problem(batch, threads)` each: runs of tiny ones, others one
/// by one. `in_turn`: where they add to the same sums.
template <class Params, class F>
void for_problems(const PairInputs& in, int threads, void (*operation)(const Params*, int64_t count), F problem,
                  bool in_turn = false) {
  constexpr double kTiny = 2e4;  // multiply-adds: a run of so small problems is hardly worth a thread
  constexpr int64_t kRun = 16;   // lanes of the longest vector; half of them do no harm, so runs are evened out
  const int64_t batches = in.batches(), runs = (batches + kRun - 1) / kRun;
  const auto alone = [&](int64_t batch, int own) {
    const Params params = problem(batch, own);
    operation(&params, 1);
  };
  if (batches >= kRun / 2 && in.work() < kTiny) {
    parallel_for(runs, in_turn ? 1 : threads, [&](int64_t run, int) {
      Params problems[kRun];
      int64_t count = 0;
      for (int64_t batch = run * batches / runs; batch < (run + 1) * batches / runs; ++batch)
        problems[count++] = problem(batch, 1);
      operation(problems, count);
    });
  } else if (in_turn) {
    for (int64_t batch = 0; batch < batches; ++batch) alone(batch, threads);
  } else {
    for_batches(batches, in.work(), threads, alone);
  }
}

/// The one switch from the name of a map.
inline PairMap map_of(const std::string& name) {
  if (name == "dot") return PairMap::dot;
  if (name == "one_minus_dot") return PairMap::one_minus_dot;
  if (name == "sqeuclidean") return PairMap::sqeuclidean;
  if (name == "euclidean") return PairMap::euclidean;
  if (name == "cityblock") return PairMap::cityblock;
  if (name == "chebyshev") return PairMap::chebyshev;
  if (name == "minkowski") return PairMap::minkowski;
  refuse_value("map", "unknown map " + name);
}

inline Screening screening_of(const std::string& name) {
  if (name == "always") return Screening::always;
  if (name == "never") return Screening::never;
  if (name == "automatic") return Screening::automatic;
  refuse_value("screening", "unknown screening " + name);
}

inline Mining mining_of(const std::string& name) {
  if (name == "hard") return Mining::hard;
  if (name == "semihard") return Mining::semihard;
  if (name == "all") return Mining::all;
  refuse_value("mining", "unknown mining " + name);
}

void register_array(py::module_& m);
void register_kernels(py::module_& m);
void register_cuda(py::module_& m);  // where NEARFAR_WITH_CUDA
void register_cuda_losses(py::module_& m);
void register_cuda_clusters(py::module_& m);
void register_losses(py::module_& m);
void register_clusters(py::module_& m);
void register_pairs(py::module_& m);
void register_system(py::module_& m);

}  // namespace nearfar
