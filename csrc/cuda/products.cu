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

template <class A, class B, class Epilogue>
void launch_blocked_product(cuda::Context& c, const Plan& plan, const A& w, const B& rows, int64_t lines, int64_t depth,
                            const Epilogue& epilogue) {
  const int64_t tiles = lines / Blocked::kRows, pieces = rows.blocks.across, steps = depth / Blocked::kColumns;
  using E = typename A::Element;
  if (plan.tile == 128)
    return launch_product<WgmmaWide<E, 128, 256>>(c, w, rows, tiles, pieces, steps, plan.splits, epilogue);
  launch_product<WgmmaWide<E, 256, 128>>(c, w, rows, tiles, pieces, steps, plan.splits, epilogue);
}

template <class E>
void multiply_blocked(cuda::Context& c, const Plan& plan, const Blocked& w, const Blocked& rows, const Block& b,
                      int64_t d, float* parts) {
  launch_blocked_product(c, plan, BlockedOperand<true, E>{w}, BlockedOperand<false, E>{rows}, b.rows, b.columns,
                         StoreParts<float>{parts, b.rows, d});
}

template <class E>
void multiply_blocked_transposed(cuda::Context& c, const Plan& plan, const Blocked& w, const Blocked& rows,
                                 const Block& b, int64_t d, const AddRows<float>& add) {
  launch_blocked_product(c, plan, BlockedOperand<false, E>{w}, BlockedOperand<false, E>{rows}, b.columns, b.rows, add);
}

template <class W, class Epilogue>
void multiply_split(cuda::Context& c, const Plan& plan, const W& w, const SplitRows& rows, int64_t lines, int64_t depth,
                    int64_t d, const Epilogue& epilogue) {
  using P = WgmmaWeights<!W::kContiguous>;
  const int64_t tiles = lines / P::kM;
  launch_wide<P>(c, w, rows, tiles, tiles, ceil_div(d, P::kN), depth / P::kDepth, plan.splits, epilogue);
}

#define NEARFAR_PRODUCTS(T, E)                                                                                       \
  template void multiply_parts<T, E>(cuda::Context&, const Plan&, const Operand<T, true>&, const Operand<E, false>&, \
                                     const Block&, int64_t, T*);                                                     \
  template void multiply_transposed<T, E>(cuda::Context&, const Plan&, const Operand<T, false>&,                     \
                                          const Operand<E, false>&, const Block&, int64_t, const AddRows<T>&);
#define NEARFAR_BLOCKED_PRODUCTS(E)                                                                            \
  template void multiply_blocked<E>(cuda::Context&, const Plan&, const Blocked&, const Blocked&, const Block&, \
                                    int64_t, float*);                                                          \
  template void multiply_blocked_transposed<E>(cuda::Context&, const Plan&, const Blocked&, const Blocked&,    \
                                               const Block&, int64_t, const AddRows<float>&);
NEARFAR_PRODUCTS(float, float)
NEARFAR_PRODUCTS(float, BF16)
NEARFAR_PRODUCTS(float, F16)
NEARFAR_PRODUCTS(double, double)
NEARFAR_BLOCKED_PRODUCTS(BF16)
NEARFAR_BLOCKED_PRODUCTS(F16)
#define NEARFAR_SPLIT_PRODUCTS(W, EPILOGUE)                                                                            \
  template void multiply_split<W, EPILOGUE>(cuda::Context&, const Plan&, const W&, const SplitRows&, int64_t, int64_t, \
                                            int64_t, const EPILOGUE&);
using Across = Operand<float, true>;
using Down = Operand<float, false>;
NEARFAR_SPLIT_PRODUCTS(Across, StoreParts<float>)
NEARFAR_SPLIT_PRODUCTS(Across, AddRows<float>)
NEARFAR_SPLIT_PRODUCTS(Down, StoreParts<float>)
NEARFAR_SPLIT_PRODUCTS(Down, AddRows<float>)

}  // namespace device
}  // namespace nearfar
