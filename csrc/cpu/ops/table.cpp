// The table of this instruction set's kernels. Adding an operation adds a line here. A level with NEARFAR_BASE is that
// level with some kernels replaced.
#include "cpu/ops.hpp"
#include "cpu/vector.hpp"

#define NEARFAR_STRING(x) #x
#define NEARFAR_NAME(x) NEARFAR_STRING(x)

#if defined(NEARFAR_BASE)
namespace nearfar::NEARFAR_BASE {
const Ops& table();
}

namespace nearfar::NEARFAR_ISA {

#if defined(__AVX512BF16__)
void softmax(SoftmaxParams<float>&);
void softmax_block(SoftmaxBlockParams<float>&);
void labelled_lse(LabelledLseParams<float>&);
void sigmoid(SigmoidParams<float>&);
#else
void select(const SelectParams<float>&);
void lloyd(LloydParams<float>&);
#endif

const Ops& table() {
  static const Ops kOps = [] {
    Ops ops = NEARFAR_BASE::table();
    ops.isa = NEARFAR_NAME(NEARFAR_ISA);
#if defined(__AVX512BF16__)
    ops.f32.softmax = softmax;
    ops.f32.softmax_block = softmax_block;
    ops.f32.labelled_lse = labelled_lse;
    ops.f32.sigmoid = sigmoid;
#else
    ops.f32.select = select;
    ops.f32.lloyd = lloyd;
#endif
    return ops;
  }();
  return kOps;
}

}  // namespace nearfar::NEARFAR_ISA
#else
namespace nearfar::NEARFAR_ISA {

void store(const StoreParams<float>*, int64_t);
void store(const StoreParams<double>*, int64_t);
void store_grad(const StoreGradParams<float>*, int64_t);
void store_grad(const StoreGradParams<double>*, int64_t);
void softmax(SoftmaxParams<float>&);
void softmax(SoftmaxParams<double>&);
void softmax_block(SoftmaxBlockParams<float>&);
void softmax_block(SoftmaxBlockParams<double>&);
void labelled_lse(LabelledLseParams<float>&);
void labelled_lse(LabelledLseParams<double>&);
void potential(PotentialParams<float>&);
void potential(PotentialParams<double>&);
void alignment(AlignmentParams<float>&);
void alignment(AlignmentParams<double>&);
void sigmoid(SigmoidParams<float>&);
void sigmoid(SigmoidParams<double>&);
void triplet(TripletParams<float>&);
void triplet(TripletParams<double>&);
void gram(const GramParams<float>*, int64_t);
void gram(const GramParams<double>*, int64_t);
void gram_grad(const GramGradParams<float>*, int64_t);
void gram_grad(const GramGradParams<double>*, int64_t);
void matmul(const MatmulParams<float>*, int64_t);
void matmul(const MatmulParams<double>*, int64_t);
void matmul_grad(const MatmulGradParams<float>*, int64_t);
void matmul_grad(const MatmulGradParams<double>*, int64_t);
void hsic(const HsicParams<float>&);
void hsic(const HsicParams<double>&);
void hsic_grad(const HsicGradParams<float>&);
void hsic_grad(const HsicGradParams<double>&);
void select(const SelectParams<float>&);
void select(const SelectParams<double>&);
void lloyd(LloydParams<float>&);
void lloyd(LloydParams<double>&);
void seeding(const SeedingParams<float>&);
void seeding(const SeedingParams<double>&);
void vector_math(int, const float*, float*, int64_t);
void vector_math(int, const double*, double*, int64_t);
double fma_peak(int threads);

template <class T>
constexpr OpsOf<T> kOpsOf = {store,     store_grad, softmax, softmax_block, labelled_lse, potential,   alignment,
                             sigmoid,   triplet,    gram,    gram_grad,     matmul,       matmul_grad, hsic,
                             hsic_grad, select,     lloyd,   seeding,       vector_math};

const Ops& table() {
  static constexpr Ops kOps = {NEARFAR_NAME(NEARFAR_ISA), kVectorBytes, fma_peak, kOpsOf<float>, kOpsOf<double>};
  return kOps;
}

}  // namespace nearfar::NEARFAR_ISA
#endif
