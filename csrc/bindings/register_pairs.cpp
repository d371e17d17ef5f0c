// Distances, neighbours.
#include "bindings/call.hpp"

namespace nearfar {
namespace {

template <class T>
T* result(py::handle out, const char* name, const PairInputs& in, bool condensed) {
  if (condensed) return output<T>(out, name, {in.batches(), in.results(true)});
  return output<T>(out, name, {in.batches(), in.n(), in.m()});
}

void store(py::handle x, py::handle y, const std::string& map, double power, bool normalize, bool same, bool condensed,
           py::handle out, int threads) {
  const PairInputs in(x, y);
  if ((same || condensed) && in.n() != in.m()) refuse_value("y", "expected the rows of x");
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* data = result<T>(out, "out", in, condensed);
    const PairMap pair_map = map_of(map);
    const Team team(threads, in.batches() * in.work());
    advise_huge_pages(data, in.batches() * in.results(condensed) * static_cast<int64_t>(sizeof(T)));
    for_problems(in, team.threads, of<T>(ops()).store, [&](int64_t b, int t) {
      return StoreParams<T>{rows_of(in.x, b),
                            rows_of(in.y, b),
                            pair_map,
                            normalize,
                            same || condensed,
                            condensed,
                            data + b * in.results(condensed),
                            t,
                            power};
    });
  });
}

void store_grad(py::handle x, py::handle y, const std::string& map, double power, bool normalize, bool same,
                bool condensed, py::handle value, py::handle grad, py::handle dx, py::handle dy, int threads) {
  const PairInputs in(x, y);
  if (same || condensed) require_same(in, dy);
  if ((same || condensed) && dx.is_none()) refuse_value("dx", "expected that of both, since y is x");
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *values = result<T>(value, "value", in, condensed), *grads = result<T>(grad, "grad", in, condensed);
    T* x_out = dx.is_none() ? nullptr : output<T>(dx, "dx", {in.batches(), in.n(), in.d()});
    T* y_out = dy.is_none() ? nullptr : output<T>(dy, "dy", {in.batches(), in.m(), in.d()});
    if (same || condensed) y_out = x_out;
    const PairMap pair_map = map_of(map);
    const Team team(threads, in.batches() * in.work());
    for_problems(in, team.threads, of<T>(ops()).store_grad, [&](int64_t b, int t) {
      return StoreGradParams<T>{rows_of(in.x, b),
                                rows_of(in.y, b),
                                pair_map,
                                normalize,
                                same || condensed,
                                condensed,
                                values + b * in.results(condensed),
                                grads + b * in.results(condensed),
                                x_out ? x_out + b * in.n() * in.d() : nullptr,
                                y_out ? y_out + b * in.m() * in.d() : nullptr,
                                t,
                                power};
    });
  });
}

void select(py::handle x, py::handle y, const std::string& map, double power, bool normalize, bool exclude_self,
            int64_t k, py::handle value, py::handle index, const std::string& screening, int threads) {
  const PairInputs in(x, y);
  const Screening mode = screening_of(screening);
  if (k < 1 || k > in.m() - (exclude_self ? 1 : 0))
    refuse_value("k",
                 "expected 1 to " + std::to_string(in.m() - (exclude_self ? 1 : 0)) + ", got " + std::to_string(k));
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* values = output<T>(value, "value", {in.batches(), in.n(), k});
    int64_t* indices = output<int64_t>(index, "index", {in.batches(), in.n(), k});
    const PairMap pair_map = map_of(map);
    const Team team(threads, in.batches() * in.work());
    for_batches(in.batches(), in.work(), team.threads, [&](int64_t b, int t) {
      of<T>(ops()).select({rows_of(in.x, b), rows_of(in.y, b), pair_map, normalize, exclude_self, k,
                           values + b * in.n() * k, indices + b * in.n() * k, mode, t, power});
    });
  });
}

}  // namespace

void register_pairs(py::module_& m) {
  using py::arg;
  m.def("store", store, arg("x"), arg("y"), arg("map"), arg("power"), arg("normalize"), arg("same"), arg("condensed"),
        arg("out"), arg("threads"), "out[b, i, j] = map(x[b, i], y[b, j]); condensed: (b, i < j).");
  m.def("store_grad", store_grad, arg("x"), arg("y"), arg("map"), arg("power"), arg("normalize"), arg("same"),
        arg("condensed"), arg("value"), arg("grad"), arg("dx"), arg("dy"), arg("threads"),
        "Adds the gradient of <grad, store(x, y)> to dx and dy; same: to dx alone.");
  m.def("select", select, arg("x"), arg("y"), arg("map"), arg("power"), arg("normalize"), arg("exclude_self"), arg("k"),
        arg("value"), arg("index"), arg("screening"), arg("threads"), "The k best columns of every row, best first.");
}

}  // namespace nearfar
