// The plain-C++ interface of the CPU kernels: one params struct per reduction, one table of functions per instruction
// set. Pointers and numbers only: nothing here knows Python, allocates outputs or owns memory.
//
// T is the compute type: float for float16, bfloat16 and float32 inputs, double for float64. Inputs may have any
// strides and any floating dtype; outputs are C-contiguous arrays of T that the caller has allocated.
#pragma once

#include <cstdint>

#include "pairwise/dtype.hpp"
#include "pairwise/pair_map.hpp"

namespace nearfar {

/// A borrowed matrix; strides count elements.
struct Rows {
  const void* data = nullptr;
  int64_t n = 0, d = 0;
  int64_t row_stride = 0, col_stride = 1;
  DType dtype = DType::f32;
};

/// out[i, j] = map(x_i, y_j).
template <class T>
struct StoreParams {
  Rows x, y;
  PairMap map;
  bool normalize;  // unit rows first
  bool same;       // y is x: half the tiles, exact zero diagonal
  bool condensed;  // only i < j, in the order of scipy's pdist (implies same)
  T* out;
  int threads;
  double power = 2;  // of minkowski
};

/// dx, dy of sum_ij grad[i, j] * map(x_i, y_j). grad has the layout of StoreParams::out; out is the forward's result.
template <class T>
struct StoreGradParams {
  Rows x, y;
  PairMap map;
  bool normalize, condensed;
  const T* out;
  const T* grad;
  T *dx, *dy;  // for condensed: their sum is the gradient
  int threads;
  double power = 2;  // of minkowski
};

/// Softmax over pairs: loss_i = log sum over the denominator of exp(s_i.) - s_i,positive with s = scale * <x, y>.
enum class SoftmaxMode : int {
  rows,   // x_i against all y_j
  both,   // the mean of rows and columns (CLIP)
  pairs,  // y is x: every row against all others, each unordered pair computed once (NT-Xent)
};

template <class T>
struct SoftmaxParams {
  SoftmaxMode mode;
  Rows x, y;      // queries and columns of the denominator (y.n may be 0)
  Rows positive;  // n rows; row (i + positive_shift) % n belongs to query i
  int64_t positive_shift;
  bool positive_is_column;  // that row is column i (rows, both) of y: it is masked there and enters by itself
  bool positive_in_sum;     // the denominator contains the positive
  Rows paired;              // (n * per_row) own negatives of each query, or empty
  int64_t paired_per_row;
  const int32_t *ids_x, *ids_y;  // null, or codes: equal codes are left out of the denominator
  double scale;
  bool normalize;
  const T* weights;  // upstream gradient of each loss_i; null: `weight` for all
  double weight;
  T* loss;                           // (n)
  double loss_sum;                   // out: sum_i loss_i
  T *dx, *dy, *dpositive, *dpaired;  // null dx: value only. May alias where the inputs are the same array
  double dscale;                     // out
  int64_t strip_budget;              // bytes of workspace for exp(s), so that the gradient needs no second product
  int threads;
};

/// log of the mean over i < j of exp(-t |x_i - x_j|^2), and its gradient.
template <class T>
struct PotentialParams {
  Rows x;
  double t;
  bool normalize;
  double log_sum;  // out: log sum over i < j
  T* dx;           // null: value only
  int threads;
};

/// mean-free alignment: value_i = |x_i - y_i|^alpha, from the differences.
template <class T>
struct AlignmentParams {
  Rows x, y;
  double alpha;
  bool normalize;
  const T* weights;  // null: `weight` for all
  double weight;
  T* value;          // (n)
  double value_sum;  // out
  T *dx, *dy;        // null: value only
  int threads;
};

/// out = K(x, y) v with K = map; v (m, r), out (n, r).
template <class T>
struct MatmulParams {
  Rows x, y, v;
  PairMap map;
  T* out;
  int threads;
};

/// dx, dy of <grad, K(x, y) v>.
template <class T>
struct MatmulGradParams {
  Rows x, y, v, grad;
  PairMap map;
  T *dx, *dy;
  int threads;
};

/// The k best columns of every row: smallest distance, or largest dot; ties by lower index.
template <class T>
struct SelectParams {
  Rows x, y;
  PairMap map;  // not gaussian
  bool normalize;
  bool exclude_self;  // column i is not a neighbour of row i
  int64_t k;
  T* value;        // (n, k)
  int64_t* index;  // (n, k)
  int threads;
  double power = 2;  // of minkowski
};

/// One iteration of k-means: labels, and the weighted sums of the rows of each centroid.
template <class T>
struct LloydParams {
  Rows x, centroids;  // centroids in the compute type
  bool normalize;     // unit rows first, both
  const T* weights;   // (n) or null: all 1
  int64_t* labels;    // (n) in: the previous ones, for `changed`; out: -1 for a row that is near to nothing
  T* distances;       // (n) squared, or null: then there is no inertia either, and x must be finite
  double* sums;       // (k, d) or null: assignment only
  double* counts;     // (k) sums of weights, or null with sums
  double inertia;     // out: sum of weight times squared distance
  int64_t changed;    // out: how many labels differ from the previous ones
  int threads;
};

/// Greedy k-means++: the rows chosen as first centroids.
template <class T>
struct SeedingParams {
  Rows x;
  bool normalize;
  const T* weights;  // (n) or null: all 1
  int64_t k, trials;
  int64_t first;           // the first chosen row
  const double* uniforms;  // (k - 1, trials) random numbers in [0, 1)
  int64_t* chosen;         // (k)
  int threads;
};

template <class T>
struct OpsOf {
  void (*store)(const StoreParams<T>&);
  void (*store_grad)(const StoreGradParams<T>&);
  void (*softmax)(SoftmaxParams<T>&);
  void (*potential)(PotentialParams<T>&);
  void (*alignment)(AlignmentParams<T>&);
  void (*matmul)(const MatmulParams<T>&);
  void (*matmul_grad)(const MatmulGradParams<T>&);
  void (*select)(const SelectParams<T>&);
  void (*lloyd)(LloydParams<T>&);
  void (*seeding)(const SeedingParams<T>&);
  void (*vector_math)(int function, const T* x, T* y, int64_t n);
};

struct Ops {
  const char* isa;
  int vector_bytes;
  double (*fma_peak)(int threads);  // GFLOP/s
  OpsOf<float> f32;
  OpsOf<double> f64;
};

template <class T>
const OpsOf<T>& of(const Ops& ops);
template <>
inline const OpsOf<float>& of<float>(const Ops& ops) {
  return ops.f32;
}
template <>
inline const OpsOf<double>& of<double>(const Ops& ops) {
  return ops.f64;
}

/// The table of the best level this CPU has, or of NEARFAR_ISA (an empty variable counts as unset).
const Ops& ops();

}  // namespace nearfar
