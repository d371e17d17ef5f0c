// k-means: an iteration, and the first centroids.
#include "bindings/call.hpp"

namespace nearfar {
namespace {

py::tuple lloyd(py::handle x, py::handle centroids, bool normalize, py::handle weights, py::handle labels,
                py::handle distances, py::handle sums, py::handle counts, const std::string& screening, int threads) {
  const Array points = input(x, "x", 2), centers = input(centroids, "centroids", 2);
  const int64_t n = points.shape[0], d = points.shape[1], k = centers.shape[0];
  require_shape(centers, "centroids", {k, d});
  if (k < 1) refuse_value("centroids", "expected at least one row");
  return with_compute_type(points.dtype, [&](auto zero) {
    using T = decltype(zero);
    require_dtype(centers, "centroids", sizeof(T) == 8 ? DType::f64 : DType::f32);
    LloydParams<T> p{};
    p.x = rows_of(points);
    p.centroids = rows_of(centers);
    p.normalize = normalize;
    p.weights = weights_of<T>(weights, n);
    p.labels = output<int64_t>(labels, "labels", {n});
    p.distances = distances.is_none() ? nullptr : output<T>(distances, "distances", {n});
    p.sums = sums.is_none() ? nullptr : output<double>(sums, "sums", {k, d});
    p.counts = sums.is_none() ? nullptr : output<double>(counts, "counts", {k});
    p.screening = screening_of(screening);
    {
      const Team team(threads, work_of(points, centers));
      p.threads = team.threads;
      of<T>(ops()).lloyd(p);
    }
    return py::make_tuple(p.inertia, p.changed);
  });
}

void seeding(py::handle x, bool normalize, py::handle weights, int64_t first, py::handle uniforms, py::handle chosen,
             int threads) {
  const Array points = input(x, "x", 2), draws = input(uniforms, "uniforms", 2, {DType::f64});
  const int64_t n = points.shape[0], k = draws.shape[0] + 1, trials = draws.shape[1];
  if (first < 0 || first >= n) refuse_value("first", "expected a row of x");
  if (trials < 1) refuse_value("uniforms", "expected at least one column");
  if (!draws.contiguous()) refuse_value("uniforms", "expected a C-contiguous array");
  with_compute_type(points.dtype, [&](auto zero) {
    using T = decltype(zero);
    SeedingParams<T> p{rows_of(points), normalize, weights_of<T>(weights, n), k,
                       trials,          first,     draws.as<double>(),        output<int64_t>(chosen, "chosen", {k}),
                       threads};
    const Team team(threads, static_cast<double>(n) * points.shape[1] * k * trials);
    p.threads = team.threads;
    of<T>(ops()).seeding(p);
  });
}

}  // namespace

void register_clusters(py::module_& m) {
  using py::arg;
  m.def("lloyd", lloyd, arg("x"), arg("centroids"), arg("normalize"), arg("weights"), arg("labels"), arg("distances"),
        arg("sums"), arg("counts"), arg("screening"), arg("threads"),
        "One iteration of k-means; returns (inertia, number of labels that changed).");
  m.def("seeding", seeding, arg("x"), arg("normalize"), arg("weights"), arg("first"), arg("uniforms"), arg("chosen"),
        arg("threads"), "Rows chosen by greedy k-means++.");
}

}  // namespace nearfar
