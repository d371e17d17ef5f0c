// Distances, Gram matrices, products with them, neighbours.
#include "bindings/call.hpp"

namespace nearfar {
namespace {

/// x and y as (batch, rows, depth) of one dtype and depth.
struct PairInputs {
  Array x, y;
  PairInputs(py::handle x_, py::handle y_) : x(input(x_, "x", 3)), y(input(y_, "y", 3)) {
    require_dtype(y, "y", x.dtype);
    require_shape(y, "y", {x.shape[0], y.shape[1], x.shape[2]});
  }
  int64_t batches() const { return x.shape[0]; }
  int64_t n() const { return x.shape[1]; }
  int64_t m() const { return y.shape[1]; }
  int64_t d() const { return x.shape[2]; }
  double work() const { return static_cast<double>(n()) * static_cast<double>(m()) * static_cast<double>(d()); }
  int64_t results(bool condensed) const { return condensed ? n() * (n() - 1) / 2 : n() * m(); }
};

template <class T>
T* result(py::handle out, const char* name, const PairInputs& in, bool condensed) {
  if (condensed) return output<T>(out, name, {in.batches(), in.results(true)});
  return output<T>(out, name, {in.batches(), in.n(), in.m()});
}

void store(py::handle x, py::handle y, const std::string& map, bool normalize, bool same, bool condensed,
           py::handle out, int threads) {
  const PairInputs in(x, y);
  if ((same || condensed) && in.n() != in.m()) refuse_value("y", "expected the rows of x");
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* data = result<T>(out, "out", in, condensed);
    const PairMap pair_map = map_of(map);
    py::gil_scoped_release release;
    advise_huge_pages(data, in.batches() * in.results(condensed) * static_cast<int64_t>(sizeof(T)));
    for_batches(in.batches(), in.work(), threads, [&](int64_t b, int t) {
      of<T>(ops()).store({rows_of(in.x, b), rows_of(in.y, b), pair_map, normalize, same || condensed, condensed,
                          data + b * in.results(condensed), t});
    });
  });
}

void store_grad(py::handle x, py::handle y, const std::string& map, bool normalize, bool condensed, py::handle value,
                py::handle grad, py::handle dx, py::handle dy, int threads) {
  const PairInputs in(x, y);
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *values = result<T>(value, "value", in, condensed), *grads = result<T>(grad, "grad", in, condensed);
    T* x_out = output<T>(dx, "dx", {in.batches(), in.n(), in.d()});
    T* y_out = output<T>(dy, "dy", {in.batches(), in.m(), in.d()});
    const PairMap pair_map = map_of(map);
    py::gil_scoped_release release;
    for_batches(in.batches(), in.work(), threads, [&](int64_t b, int t) {
      of<T>(ops()).store_grad({rows_of(in.x, b), rows_of(in.y, b), pair_map, normalize, condensed,
                               values + b * in.results(condensed), grads + b * in.results(condensed),
                               x_out + b * in.n() * in.d(), y_out + b * in.m() * in.d(), t});
    });
  });
}

void matmul(py::handle x, py::handle y, py::handle v, const std::string& map, py::handle out, int threads) {
  const PairInputs in(x, y);
  const Array values = input(v, "v", 3);
  require_dtype(values, "v", in.x.dtype);
  require_shape(values, "v", {in.batches(), in.m(), values.shape[2]});
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t r = values.shape[2];
    T* data = output<T>(out, "out", {in.batches(), in.n(), r});
    const PairMap pair_map = map_of(map);
    py::gil_scoped_release release;
    for_batches(in.batches(), in.work(), threads, [&](int64_t b, int t) {
      of<T>(ops()).matmul({rows_of(in.x, b), rows_of(in.y, b), rows_of(values, b), pair_map, data + b * in.n() * r, t});
    });
  });
}

void matmul_grad(py::handle x, py::handle y, py::handle v, py::handle grad, const std::string& map, py::handle dx,
                 py::handle dy, int threads) {
  const PairInputs in(x, y);
  const Array values = input(v, "v", 3), upstream = input(grad, "grad", 3);
  require_dtype(values, "v", in.x.dtype);
  require_shape(values, "v", {in.batches(), in.m(), values.shape[2]});
  require_shape(upstream, "grad", {in.batches(), in.n(), values.shape[2]});
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* x_out = output<T>(dx, "dx", {in.batches(), in.n(), in.d()});
    T* y_out = output<T>(dy, "dy", {in.batches(), in.m(), in.d()});
    const PairMap pair_map = map_of(map);
    py::gil_scoped_release release;
    for_batches(in.batches(), in.work(), threads, [&](int64_t b, int t) {
      of<T>(ops()).matmul_grad({rows_of(in.x, b), rows_of(in.y, b), rows_of(values, b), rows_of(upstream, b), pair_map,
                                x_out + b * in.n() * in.d(), y_out + b * in.m() * in.d(), t});
    });
  });
}

void select(py::handle x, py::handle y, const std::string& map, bool normalize, bool exclude_self, int64_t k,
            py::handle value, py::handle index, int threads) {
  const PairInputs in(x, y);
  if (k < 1 || k > in.m() - (exclude_self ? 1 : 0))
    refuse_value("k",
                 "expected 1 to " + std::to_string(in.m() - (exclude_self ? 1 : 0)) + ", got " + std::to_string(k));
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* values = output<T>(value, "value", {in.batches(), in.n(), k});
    int64_t* indices = output<int64_t>(index, "index", {in.batches(), in.n(), k});
    const PairMap pair_map = map_of(map);
    py::gil_scoped_release release;
    for_batches(in.batches(), in.work(), threads, [&](int64_t b, int t) {
      of<T>(ops()).select({rows_of(in.x, b), rows_of(in.y, b), pair_map, normalize, exclude_self, k,
                           values + b * in.n() * k, indices + b * in.n() * k, t});
    });
  });
}

}  // namespace

void register_pairs(py::module_& m) {
  using py::arg;
  m.def("store", store, arg("x"), arg("y"), arg("map"), arg("normalize"), arg("same"), arg("condensed"), arg("out"),
        arg("threads"), "out[b, i, j] = map(x[b, i], y[b, j]); condensed: (b, i < j).");
  m.def("store_grad", store_grad, arg("x"), arg("y"), arg("map"), arg("normalize"), arg("condensed"), arg("value"),
        arg("grad"), arg("dx"), arg("dy"), arg("threads"), "Adds the gradient of <grad, store(x, y)> to dx and dy.");
  m.def("matmul", matmul, arg("x"), arg("y"), arg("v"), arg("map"), arg("out"), arg("threads"), "out = K(x, y) v.");
  m.def("matmul_grad", matmul_grad, arg("x"), arg("y"), arg("v"), arg("grad"), arg("map"), arg("dx"), arg("dy"),
        arg("threads"), "Adds the gradient of <grad, K(x, y) v> to dx and dy.");
  m.def("select", select, arg("x"), arg("y"), arg("map"), arg("normalize"), arg("exclude_self"), arg("k"), arg("value"),
        arg("index"), arg("threads"), "The k best columns of every row, best first.");
}

}  // namespace nearfar
