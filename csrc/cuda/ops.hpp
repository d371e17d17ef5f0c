// The plain-C++ interface of the CUDA kernels: the params of the CPU's (cpu/ops.hpp; `threads` is not read), with
// device pointers, and what must stay on the device because nothing here waits for it.
#pragma once

#include "cpu/ops.hpp"
#include "cuda/context.hpp"

namespace nearfar::cuda {

template <class T>
struct SoftmaxDevice : SoftmaxParams<T> {
  const int64_t* ids = nullptr;      // (x.n): in place of codes; columns past them match nothing
  const double* scale_at = nullptr;  // null: `scale`
  double* loss_total = nullptr;      // out: sum of losses
  double* dscale_at = nullptr;       // out
};

template <class T>
struct SoftmaxBlockDevice : SoftmaxBlockParams<T> {
  const int64_t *own_ids = nullptr, *other_ids = nullptr;  // in place of codes
  const double* scale_at = nullptr;                        // null: `scale`
  double* dscale_at = nullptr;                             // out
};

template <class T>
struct SigmoidDevice : SigmoidParams<T> {
  const double *scale_at = nullptr, *bias_at = nullptr;  // null: `scale`, `bias`
  double *loss_total = nullptr, *dscale_at = nullptr, *dbias_at = nullptr;
};

template <class T>
struct LabelledLseDevice : LabelledLseParams<T> {
  const int64_t *ids_x = nullptr, *ids_y = nullptr;  // in place of codes; ids_x null: the label of a row is its number
  const double* scale_at = nullptr;                  // null: `scale`
  double* dscale_at = nullptr;
};

/// SupCon: `labels` of items in place of classes.
template <class T>
struct SupConDevice : SoftmaxParams<T> {
  const int64_t* labels = nullptr;
  const double* scale_at = nullptr;  // null: `scale`
  double *loss_total = nullptr, *dscale_at = nullptr, *anchors_at = nullptr;
};

template <class T>
struct PotentialDevice : PotentialParams<T> {
  double* log_sum_at = nullptr;
};

template <class T>
struct AlignmentDevice : AlignmentParams<T> {
  double* value_total = nullptr;
};

/// Triplets: `labels` in place of classes.
template <class T>
struct TripletDevice : TripletParams<T> {
  const int64_t* labels = nullptr;
  const int64_t* begin = nullptr;  // (n) of semihard that is mined: where the pairs of an anchor begin
  double *total = nullptr, *count_at = nullptr;
};

template <class T>
struct LloydDevice : LloydParams<T> {
  double *inertia_at = nullptr, *changed_at = nullptr;
};

// Kernels given as programs. Their parameters may lie on the device; null: in the program.
template <class T>
struct GramDevice : GramParams<T> {
  const double* parameters_at = nullptr;
};

template <class T>
struct GramGradDevice : GramGradParams<T> {
  const double* parameters_at = nullptr;
};

template <class T>
struct MatmulDevice : MatmulParams<T> {
  const double* parameters_at = nullptr;
};

template <class T>
struct MatmulGradDevice : MatmulGradParams<T> {
  const double* parameters_at = nullptr;
};

template <class T>
struct HsicDevice : HsicParams<T> {
  const double* parameters_at[2] = {};
};

template <class T>
struct HsicGradDevice : HsicGradParams<T> {
  const double* parameters_at[2] = {};
};

// Instantiated for float and double; see cuda/ops/*.cu.
template <class T>
void store(Context& c, const StoreParams<T>& p);
template <class T>
void store_grad(Context& c, const StoreGradParams<T>& p);
template <class T>
void softmax(Context& c, const SoftmaxDevice<T>& p);
template <class T>
void softmax_block(Context& c, const SoftmaxBlockDevice<T>& p);
template <class T>
void sigmoid(Context& c, const SigmoidDevice<T>& p);
template <class T>
void labelled_lse(Context& c, const LabelledLseDevice<T>& p);
template <class T>
void sup_con(Context& c, const SupConDevice<T>& p);
template <class T>
void triplet(Context& c, const TripletDevice<T>& p);
template <class T>
void potential(Context& c, const PotentialDevice<T>& p);
template <class T>
void alignment(Context& c, const AlignmentDevice<T>& p);
template <class T>
void gram(Context& c, const GramDevice<T>& p);
template <class T>
void gram_grad(Context& c, const GramGradDevice<T>& p);
template <class T>
void matmul(Context& c, const MatmulDevice<T>& p);
template <class T>
void matmul_grad(Context& c, const MatmulGradDevice<T>& p);
template <class T>
void hsic(Context& c, const HsicDevice<T>& p);
template <class T>
void hsic_grad(Context& c, const HsicGradDevice<T>& p);
template <class T>
void select(Context& c, const SelectParams<T>& p);
template <class T>
void lloyd(Context& c, const LloydDevice<T>& p);
/// `uniforms` and `chosen` lie on the device.
template <class T>
void seeding(Context& c, const SeedingParams<T>& p);

#define NEARFAR_INSTANTIATE(operation, Params)                      \
  namespace nearfar::cuda {                                         \
  template void operation<float>(Context&, const Params<float>&);   \
  template void operation<double>(Context&, const Params<double>&); \
  }

}  // namespace nearfar::cuda
