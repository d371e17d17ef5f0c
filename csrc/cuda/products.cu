// The two products of a gradient: the kernels that every operation shares.
#include "cuda/strip.hpp"

namespace nearfar {
inline namespace device {

template <class T, class E>
void multiply_parts(cuda::Context& c, const Plan& plan, const Operand<T, true>& w, const Operand<E, false>& rows,
                    const Block& b, int64_t d, T* parts) {
  with_product_policy<E, true>(c, plan, [&](auto policy) {
    launch_tiles<decltype(policy)>(c, w, rows, b.rows, d, b.columns, plan.splits, StoreParts<T>{parts, b.rows, d});
  });
}

template <class T, class E>
void multiply_transposed(cuda::Context& c, const Plan& plan, const Operand<T, false>& w, const Operand<E, false>& rows,
                         const Block& b, int64_t d, const AddRows<T>& add) {
  with_product_policy<E, false>(
      c, plan, [&](auto policy) { launch_tiles<decltype(policy)>(c, w, rows, b.columns, d, b.rows, 1, add); });
}

template <class E>
void multiply_blocked(cuda::Context& c, int64_t splits, const Blocked& w, const Blocked& rows, const Block& b,
                      int64_t d, float* parts) {
  launch_wgmma(c, BlockedOperand<true, E>{w}, BlockedOperand<false, E>{rows}, b.rows / Blocked::kRows,
               ceil_div(d, Blocked::kRows), b.columns / Blocked::kColumns, splits, StoreParts<float>{parts, b.rows, d});
}

template <class E>
void multiply_blocked_transposed(cuda::Context& c, const Blocked& w, const Blocked& rows, const Block& b, int64_t d,
                                 const AddRows<float>& add) {
  launch_wgmma(c, BlockedOperand<false, E>{w}, BlockedOperand<false, E>{rows}, b.columns / Blocked::kRows,
               ceil_div(d, Blocked::kRows), b.rows / Blocked::kColumns, 1, add);
}

#define NEARFAR_PRODUCTS(T, E)                                                                                       \
  template void multiply_parts<T, E>(cuda::Context&, const Plan&, const Operand<T, true>&, const Operand<E, false>&, \
                                     const Block&, int64_t, T*);                                                     \
  template void multiply_transposed<T, E>(cuda::Context&, const Plan&, const Operand<T, false>&,                     \
                                          const Operand<E, false>&, const Block&, int64_t, const AddRows<T>&);
#define NEARFAR_BLOCKED_PRODUCTS(E)                                                                                   \
  template void multiply_blocked<E>(cuda::Context&, int64_t, const Blocked&, const Blocked&, const Block&, int64_t,   \
                                    float*);                                                                          \
  template void multiply_blocked_transposed<E>(cuda::Context&, const Blocked&, const Blocked&, const Block&, int64_t, \
                                               const AddRows<float>&);
NEARFAR_PRODUCTS(float, float)
NEARFAR_PRODUCTS(float, BF16)
NEARFAR_PRODUCTS(float, F16)
NEARFAR_PRODUCTS(double, double)
NEARFAR_BLOCKED_PRODUCTS(BF16)
NEARFAR_BLOCKED_PRODUCTS(F16)

}  // namespace device
}  // namespace nearfar
