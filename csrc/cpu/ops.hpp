// The plain-C++ interface of the CPU kernels: one params struct per reduction, one table of functions per instruction
// set. Pointers and numbers only: nothing here knows Python, allocates outputs or owns memory.
//
// T is the compute type: float for float16, bfloat16 and float32 inputs, double for float64. Inputs may have any
// strides and any floating dtype; outputs are C-contiguous arrays of T that the caller has allocated.
#pragma once

#include <cstdint>

#include "pairwise/dtype.hpp"
#include "pairwise/pair_map.hpp"
#include "pairwise/program.hpp"

namespace nearfar {

/// A borrowed matrix; strides count elements.
struct Rows {
  const void* data = nullptr;
  int64_t n = 0, d = 0;
  int64_t row_stride = 0, col_stride = 1;
  DType dtype = DType::f32;
};

/// Those that a score of a program reads.
inline Rows columns_of(const Rows& rows, const ProgramScore& score) {
  Rows own = rows;
  own.data = static_cast<const char*>(rows.data) + score.begin * rows.col_stride * size_of(rows.dtype);
  own.d = score.end - score.begin;
  return own;
}

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
  bool normalize;
  bool same;       // y is x, and dy dx: that of both
  bool condensed;  // implies same
  const T* out;
  const T* grad;
  T *dx, *dy;  // null: not wanted; on the GPU dx always is
  int threads;
  double power = 2;  // of minkowski
};

/// Softmax over pairs: loss_i = log sum over the denominator of exp(s_i.) - s_i,positive with s = scale * <x, y>.
enum class SoftmaxMode : int {
  rows,   // x_i against all y_j
  both,   // the mean of rows and columns (CLIP)
  pairs,  // y is x: every row against all others, each unordered pair computed once (NT-Xent)
};

/// Sets of positives among the rows of x (pairs only): neither, classes, or a mask.
struct Positives {
  const int32_t* classes = nullptr;  // (n) codes below n: rows of one code are positives of each other
  const uint8_t* mask = nullptr;     // (n / views)^2: nonzero where items are positives; strides count elements
  int64_t mask_row_stride = 0, mask_col_stride = 0;
  int64_t views = 1;  // row i of x is a view of item i / views; the views of an item are positives of each other
};

template <class T>
struct SoftmaxParams {
  SoftmaxMode mode;
  Rows x, y;      // queries and columns of the denominator (y.n may be 0)
  Rows positive;  // n rows; row (i + positive_shift) % n belongs to query i
  int64_t positive_shift;
  bool positive_is_column;  // that row is column i (rows, both) of y: it is masked there and enters by itself
  bool positive_in_sum;     // the denominator contains the positive
  Positives positives;      // instead of one positive a row: the mean over a set, denominators hold all but the row
  Rows paired;              // (n * per_row) own negatives of each query, or empty
  int64_t paired_per_row;
  const int32_t *ids_x, *ids_y;  // null, or codes: equal codes are left out of the denominator
  double scale;
  bool normalize;
  const T* weights;  // upstream gradient of each loss_i; null: `weight` for all
  double weight;
  bool weight_of_mean;  // `weight` is divided by the number of anchors
  T* loss;              // (n)
  double loss_sum;      // out: sum_i loss_i
  int64_t anchors;      // out: rows that have a positive
  // null dx: value only; of the others those that are null are not wanted. May alias where the inputs are the same
  // array
  T *dx, *dy, *dpositive, *dpaired;
  double dscale;         // out
  int64_t strip_budget;  // bytes of workspace for exp(s), so that the gradient needs no second product
  int threads;
};

/// One block of a softmax that is spread over processes: log-sum-exps of its rows and columns; or, once the whole ones
/// are known, the gradient of weights u_i e^{s_ij - lse_x[i]} + v_j e^{s_ij - lse_y[j]}.
template <class T>
struct SoftmaxBlockParams {
  Rows x, y;
  bool same;                     // y is x: a row is not its own column, and what is of columns is of rows
  const int32_t *ids_x, *ids_y;  // null, or codes: equal codes are left out
  double scale;
  bool normalize;
  double *lse_x, *lse_y;              // (n), (m); lse_y null: columns are not wanted
  const double *weight_x, *weight_y;  // u, v, with dx
  T *dx, *dy;                         // null: log-sum-exps. same: dy is dx
  double dscale;                      // out
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

/// A map of scores: slope(s) (s - shift) with slope(s) = sign max(q s + r, 0), which is a constant to the derivative.
struct ScoreMap {
  double sign, q, r, shift;
};

/// lse[i, k] = log of the sums, over the columns of row i's label (k = 0) and over the others (1), of e^{map k of
/// s_ij}, s = scale * <x, y>; and (2) over the others of e^{power * map 1}.
template <class T>
struct LabelledLseParams {
  Rows x, y;
  bool same;  // y is x: a row is not its own column
  const int32_t *labels_x, *labels_y;
  double scale;
  bool normalize;
  ScoreMap maps[2];
  double power;
  int terms;           // 2, or 3 with `power`
  double* lse;         // (n, terms): the result; where dx is wanted, given
  const double* grad;  // upstream gradient of lse, where dx is wanted
  T *dx, *dy;          // null dx: value only; dy is dx where y is x
  double dscale;       // out
  int threads;
};

/// loss_i = sum_j softplus(-z_ij (scale <x_i, y_j> + bias)), z = 1 where j = i, else -1. As many rows of x as of y.
template <class T>
struct SigmoidParams {
  Rows x, y;
  bool matched;  // row i of y is the match of row i of x; else no pair is a match
  double scale, bias;
  bool normalize;
  const T* weights;  // upstream gradient of each loss_i; null: `weight` for all
  double weight;
  T* loss;               // (n)
  double loss_sum;       // out
  T *dx, *dy;            // null dx: value only; null dy: not wanted
  double dscale, dbias;  // out
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

/// Which triplets (anchor, positive, negative) of a labelled batch count.
enum class Mining : int {
  hard,      // per anchor its farthest positive and nearest negative
  semihard,  // per anchor and positive the closest negative that is farther, or else the farthest negative
  all,       // every one
};

/// Sum over triplets of max(0, v_ap - v_an + margin), or softplus(v_ap - v_an); v is the distance or its square.
template <class T>
struct TripletParams {
  Rows x;
  const int32_t* codes;  // (n) classes, in [0, classes)
  int64_t classes;
  Mining mining;
  double margin;
  bool squared, soft, normalize;
  const T* weights;  // upstream gradient of each anchor's sum; null: 1
  bool mean;         // divide the sum and the gradient by count
  T* value;          // (n) each anchor's sum
  double value_sum;  // out
  int64_t count;     // out: triplets; of all of them, without `soft`, those with positive loss
  T* dx;             // null: value only
  // Null, or what was mined: (n) for hard; for semihard the pairs of one class, by anchor, then by positive. -1: none.
  int64_t *positive, *negative;
  int threads;
};

/// out = K(x, y) v with K = map; v (m, r), out (n, r).
/// out[i, j] = k(x_i, y_j) for a kernel given as a program.
template <class T>
struct GramParams {
  Rows x, y;
  const Program* program;
  bool same;  // y is x
  T* out;
  int threads;
};

/// dx, dy and the gradient of the parameters of sum_ij grad[i, j] k(x_i, y_j); each is added to, null if not wanted.
template <class T>
struct GramGradParams {
  Rows x, y;
  const Program* program;
  bool same;  // as in StoreGradParams
  const T* grad;
  T *dx, *dy;
  double* dparameters;
  int threads;
};

/// out = K(x, y) v for a kernel given as a program; v (m, r), out (n, r).
template <class T>
struct MatmulParams {
  Rows x, y, v;
  const Program* program;
  bool same;  // y is x
  T* out;
  int threads;
};

/// dx, dy and the gradient of the parameters of <grad, K(x, y) v>; each is added to, null if not wanted.
template <class T>
struct MatmulGradParams {
  Rows x, y, v, grad;
  const Program* program;
  bool same;  // as in StoreGradParams
  T *dx, *dy;
  double* dparameters;
  int threads;
};

/// sum_ij K'_ij L'_ij, sum_ij K'_ij^2, sum_ij L'_ij^2 of the centred matrices of two kernels given as programs, each on
/// points of its own: K'_ij = k(x_i, x_j) - a_i - a_j with rows that sum to 0; with or without the diagonal.
template <class T>
struct HsicParams {
  Rows points[2];  // of n rows
  const Program* program[2];
  bool diagonal;
  double* values;  // (3 + 2 n): the sums, then a and b
  int threads;
};

/// The gradient of <grad, the three sums>; each is added to, null if not wanted.
template <class T>
struct HsicGradParams {
  Rows points[2];
  const Program* program[2];
  bool diagonal;
  const double* values;  // of the forward pass
  const double* grad;    // (3)
  T* dpoints[2];
  double* dparameters[2];
  int threads;
};

/// Whether a search first rules columns out, by their scores with 8-bit integers (cpu/screen.hpp) or in few dimensions
/// by boxes around them (cpu/boxes.hpp), which does not change what it finds: where that is faster, or as the tests
/// want it.
enum class Screening : int { automatic, always, never };

/// The k best columns of every row: smallest distance, or largest dot; ties by lower index.
template <class T>
struct SelectParams {
  Rows x, y;
  PairMap map;
  bool normalize;
  bool exclude_self;  // column i is not a neighbour of row i
  int64_t k;
  T* value;        // (n, k)
  int64_t* index;  // (n, k)
  Screening screening;
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
  Screening screening = Screening::automatic;
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

/// What takes a `count` solves as many problems of one shape, each with memory of its own but that of a program and its
/// parameters; many tiny ones at once (together.hpp).
template <class T>
struct OpsOf {
  void (*store)(const StoreParams<T>*, int64_t count);
  void (*store_grad)(const StoreGradParams<T>*, int64_t count);
  void (*softmax)(SoftmaxParams<T>&);
  void (*softmax_block)(SoftmaxBlockParams<T>&);
  void (*labelled_lse)(LabelledLseParams<T>&);
  void (*potential)(PotentialParams<T>&);
  void (*alignment)(AlignmentParams<T>&);
  void (*sigmoid)(SigmoidParams<T>&);
  void (*triplet)(TripletParams<T>&);
  void (*gram)(const GramParams<T>*, int64_t count);
  void (*gram_grad)(const GramGradParams<T>*, int64_t count);
  void (*matmul)(const MatmulParams<T>*, int64_t count);
  void (*matmul_grad)(const MatmulGradParams<T>*, int64_t count);
  void (*hsic)(const HsicParams<T>&);
  void (*hsic_grad)(const HsicGradParams<T>&);
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
