// k-means on device memory: an iteration, and the first centroids.
#if defined(NEARFAR_WITH_CUDA)
#include "bindings/cuda_call.hpp"

namespace nearfar {
namespace cuda_bindings {

/// totals (2): the inertia, and how many labels changed.
void lloyd(py::handle x_, py::handle centroids, bool normalize, py::handle weights, py::handle labels,
           py::handle distances, py::handle sums, py::handle counts, py::handle totals, const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2), centers = call.input(centroids, "centroids", 2);
  const int64_t n = x.shape[0], d = x.shape[1], k = centers.shape[0];
  require_shape(centers, "centroids", {k, d});
  if (k < 1) refuse_value("centroids", "expected at least one row");
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    require_dtype(centers, "centroids", sizeof(T) == 8 ? DType::f64 : DType::f32);
    cuda::LloydDevice<T> p{};
    p.x = rows_of(x);
    p.centroids = rows_of(centers);
    p.normalize = normalize;
    p.weights = weights.is_none() ? nullptr : call.output<T>(weights, "weights", {n});
    p.labels = call.output<int64_t>(labels, "labels", {n});
    p.distances = distances.is_none() ? nullptr : call.output<T>(distances, "distances", {n});
    p.sums = sums.is_none() ? nullptr : call.output<double>(sums, "sums", {k, d});
    p.counts = sums.is_none() ? nullptr : call.output<double>(counts, "counts", {k});
    p.inertia_at = call.output<double>(totals, "totals", {2});
    p.changed_at = p.inertia_at + 1;
    call.run(where, [&](cuda::Context& c) { cuda::lloyd<T>(c, p); });
  });
}

void seeding(py::handle x_, bool normalize, py::handle weights, int64_t first, py::handle uniforms, py::handle chosen,
             const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2), draws = call.input(uniforms, "uniforms", 2, {DType::f64});
  const int64_t n = x.shape[0];
  if (first < 0 || first >= n) refuse_value("first", "expected a row of x");
  if (draws.shape[1] < 1) refuse_value("uniforms", "expected at least one column");
  if (!draws.contiguous()) refuse_value("uniforms", "expected a C-contiguous array");
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    SeedingParams<T> p{};
    p.x = rows_of(x);
    p.normalize = normalize;
    p.weights = weights.is_none() ? nullptr : call.output<T>(weights, "weights", {n});
    p.k = draws.shape[0] + 1;
    p.trials = draws.shape[1];
    p.first = first;
    p.uniforms = draws.as<double>();
    p.chosen = call.output<int64_t>(chosen, "chosen", {p.k});
    call.run(where, [&](cuda::Context& c) { cuda::seeding<T>(c, p); });
  });
}

}  // namespace cuda_bindings

void register_cuda_clusters(py::module_& m) {
  using py::arg;
  m.def("lloyd", cuda_bindings::lloyd, arg("x"), arg("centroids"), arg("normalize"), arg("weights"), arg("labels"),
        arg("distances"), arg("sums"), arg("counts"), arg("totals"), arg("where"));
  m.def("seeding", cuda_bindings::seeding, arg("x"), arg("normalize"), arg("weights"), arg("first"), arg("uniforms"),
        arg("chosen"), arg("where"));
}

}  // namespace nearfar
#endif
