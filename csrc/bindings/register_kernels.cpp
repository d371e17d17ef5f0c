// Kernels as programs: Gram matrices, products with them, their gradients.
#include "bindings/call.hpp"
#include "bindings/program.hpp"

namespace nearfar {
namespace {

/// A result that may be missing.
template <class T>
T* optional_output(py::handle out, const char* name, std::initializer_list<int64_t> shape) {
  return out.is_none() ? nullptr : output<T>(out, name, shape);
}

template <class T>
T* moved(T* data, int64_t offset) {
  return data ? data + offset : nullptr;
}

void gram(py::handle x, py::handle y, const std::string& text, py::handle parameters, bool same, py::handle out,
          int threads) {
  const PairInputs in(x, y);
  if (same && in.n() != in.m()) refuse_value("y", "expected the rows of x");
  const Program program = parse_program(text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = in.n() * in.m();
    T* data = output<T>(out, "out", {in.batches(), in.n(), in.m()});
    const Team team(threads, in.batches() * in.work());
    advise_huge_pages(data, in.batches() * size * static_cast<int64_t>(sizeof(T)));
    for_batches(in.batches(), in.work(), team.threads, [&](int64_t b, int t) {
      of<T>(ops()).gram({rows_of(in.x, b), rows_of(in.y, b), &program, same, data + b * size, t});
    });
  });
}

/// What both gradients write.
template <class T>
struct Gradients {
  T *dx, *dy;
  double* dparameters;
  Gradients(const PairInputs& in, const Program& program, py::handle x, py::handle y, py::handle p)
      : dx(optional_output<T>(x, "dx", {in.batches(), in.n(), in.d()})),
        dy(optional_output<T>(y, "dy", {in.batches(), in.m(), in.d()})),
        dparameters(optional_output<double>(p, "dparameters", {program.parameters})) {}

  /// f(batch, threads); batches in turn where they add to the gradient of the parameters.
  template <class F>
  void for_each(const PairInputs& in, int threads, F f) const {
    if (!dparameters) return for_batches(in.batches(), in.work(), threads, f);
    for (int64_t b = 0; b < in.batches(); ++b) f(b, threads);
  }
};

void gram_grad(py::handle x, py::handle y, const std::string& text, py::handle parameters, py::handle grad,
               py::handle dx, py::handle dy, py::handle dparameters, int threads) {
  const PairInputs in(x, y);
  const Program program = parse_program(text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* upstream = output<T>(grad, "grad", {in.batches(), in.n(), in.m()});
    const Gradients<T> g(in, program, dx, dy, dparameters);
    const Team team(threads, in.batches() * in.work());
    g.for_each(in, team.threads, [&](int64_t b, int t) {
      of<T>(ops()).gram_grad({rows_of(in.x, b), rows_of(in.y, b), &program, upstream + b * in.n() * in.m(),
                              moved(g.dx, b * in.n() * in.d()), moved(g.dy, b * in.m() * in.d()), g.dparameters, t});
    });
  });
}

void matmul(py::handle x, py::handle y, py::handle v, const std::string& text, py::handle parameters, bool same,
            py::handle out, int threads) {
  const PairInputs in(x, y);
  if (same && in.n() != in.m()) refuse_value("y", "expected the rows of x");
  const Array values = input(v, "v", 3);
  require_dtype(values, "v", in.x.dtype);
  require_shape(values, "v", {in.batches(), in.m(), values.shape[2]});
  const Program program = parse_program(text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = in.n() * values.shape[2];
    T* data = output<T>(out, "out", {in.batches(), in.n(), values.shape[2]});
    const Team team(threads, in.batches() * in.work());
    for_batches(in.batches(), in.work(), team.threads, [&](int64_t b, int t) {
      of<T>(ops()).matmul({rows_of(in.x, b), rows_of(in.y, b), rows_of(values, b), &program, same, data + b * size, t});
    });
  });
}

void matmul_grad(py::handle x, py::handle y, py::handle v, py::handle grad, const std::string& text,
                 py::handle parameters, py::handle dx, py::handle dy, py::handle dparameters, int threads) {
  const PairInputs in(x, y);
  const Array values = input(v, "v", 3), upstream = input(grad, "grad", 3);
  require_dtype(values, "v", in.x.dtype);
  require_dtype(upstream, "grad", in.x.dtype);
  require_shape(values, "v", {in.batches(), in.m(), values.shape[2]});
  require_shape(upstream, "grad", {in.batches(), in.n(), values.shape[2]});
  const Program program = parse_program(text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> g(in, program, dx, dy, dparameters);
    const Team team(threads, in.batches() * in.work());
    g.for_each(in, team.threads, [&](int64_t b, int t) {
      of<T>(ops()).matmul_grad({rows_of(in.x, b), rows_of(in.y, b), rows_of(values, b), rows_of(upstream, b), &program,
                                moved(g.dx, b * in.n() * in.d()), moved(g.dy, b * in.m() * in.d()), g.dparameters, t});
    });
  });
}

}  // namespace

void register_kernels(py::module_& m) {
  using py::arg;
  m.def("gram", gram, arg("x"), arg("y"), arg("program"), arg("parameters"), arg("same"), arg("out"), arg("threads"),
        "out[b, i, j] = k(x[b, i], y[b, j]) for a kernel given as a program.");
  m.def("gram_grad", gram_grad, arg("x"), arg("y"), arg("program"), arg("parameters"), arg("grad"), arg("dx"),
        arg("dy"), arg("dparameters"), arg("threads"),
        "Adds the gradient of <grad, gram(x, y)> to dx, dy and dparameters; None: not wanted.");
  m.def("matmul", matmul, arg("x"), arg("y"), arg("v"), arg("program"), arg("parameters"), arg("same"), arg("out"),
        arg("threads"), "out = K(x, y) v for a kernel given as a program.");
  m.def("matmul_grad", matmul_grad, arg("x"), arg("y"), arg("v"), arg("grad"), arg("program"), arg("parameters"),
        arg("dx"), arg("dy"), arg("dparameters"), arg("threads"),
        "Adds the gradient of <grad, K(x, y) v> to dx, dy and dparameters; None: not wanted.");
}

}  // namespace nearfar
