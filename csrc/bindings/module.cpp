// The module: each family registers itself.
#include "bindings/call.hpp"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled kernels of nearfar. Private: use the functions of the package.";
  nearfar::register_array(m);
  nearfar::register_system(m);
  nearfar::register_pairs(m);
  nearfar::register_kernels(m);
  nearfar::register_clusters(m);
  nearfar::register_losses(m);
#if defined(NEARFAR_WITH_CUDA)
  nearfar::register_cuda(m);
#endif
}
