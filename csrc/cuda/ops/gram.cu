// Gram matrices of kernels given as programs, and the gradient through them. As in store.cu, the matrix is the result.
#include "cuda/ops.hpp"
#include "cuda/program_gradient.hpp"

namespace nearfar {
namespace cuda {

template <class T>
void gram(Context& c, const GramDevice<T>& p) {
  PackedProgram<T> kernel(c, *p.program, p.parameters_at, p.x, p.y, p.same, false);
  // One score lies where the result goes. More take blocks.
  const bool one = kernel.program.scores == 1;
  Strip<T, T> blocks(c, kernel[0], false, false, nullptr, nullptr);
  if (one) return kernel.values(part_of(p.out, p.y.n, kernel[0].all()), false);
  kernel.take_others(blocks.shape);
  blocks.for_blocks([&](const Weights<T>& b) { kernel.values(part_of(p.out, p.y.n, b.block), false); });
}

template <class T>
void gram_grad(Context& c, const GramGradDevice<T>& p) {
  // The matrix is read only.
  T* grad = const_cast<T*>(p.grad);
  program_gradient<T>(c, *p.program, p.parameters_at, p.x, p.y, p.dx, p.dy, p.dparameters, false,
                      [&](const Weights<T>& room) { return part_of(grad, p.y.n, room.block); });
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(gram, GramDevice)
NEARFAR_INSTANTIATE(gram_grad, GramGradDevice)
