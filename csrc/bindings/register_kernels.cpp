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
    for_problems(in, team.threads, of<T>(ops()).gram, [&](int64_t b, int t) {
      return GramParams<T>{rows_of(in.x, b), rows_of(in.y, b), &program, same, data + b * size, t};
    });
  });
}

/// What both gradients write.
template <class T>
struct Gradients {
  T *dx, *dy;
  double* dparameters;
  Gradients(const PairInputs& in, const Program& program, bool same, py::handle x, py::handle y, py::handle p)
      : dx(optional_output<T>(x, "dx", {in.batches(), in.n(), in.d()})),
        dy(same ? dx : optional_output<T>(y, "dy", {in.batches(), in.m(), in.d()})),
        dparameters(optional_output<double>(p, "dparameters", {program.parameters})) {
    if (same) require_same(in, y);
  }

  /// Batches in turn where they add to the gradient of the parameters.
  template <class Params, class F>
  void for_each(const PairInputs& in, int threads, void (*operation)(const Params*, int64_t), F problem) const {
    for_problems(in, threads, operation, problem, dparameters != nullptr);
  }
};

void gram_grad(py::handle x, py::handle y, const std::string& text, py::handle parameters, bool same, py::handle grad,
               py::handle dx, py::handle dy, py::handle dparameters, int threads) {
  const PairInputs in(x, y);
  const Program program = parse_program(text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* upstream = output<T>(grad, "grad", {in.batches(), in.n(), in.m()});
    const Gradients<T> g(in, program, same, dx, dy, dparameters);
    const Team team(threads, in.batches() * in.work());
    g.for_each(in, team.threads, of<T>(ops()).gram_grad, [&](int64_t b, int t) {
      return GramGradParams<T>{rows_of(in.x, b),
                               rows_of(in.y, b),
                               &program,
                               same,
                               upstream + b * in.n() * in.m(),
                               moved(g.dx, b * in.n() * in.d()),
                               moved(g.dy, b * in.m() * in.d()),
                               g.dparameters,
                               t};
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
    for_problems(in, team.threads, of<T>(ops()).matmul, [&](int64_t b, int t) {
      return MatmulParams<T>{
          rows_of(in.x, b), rows_of(in.y, b), rows_of(values, b), &program, same, data + b * size, t};
    });
  });
}

void matmul_grad(py::handle x, py::handle y, py::handle v, py::handle grad, const std::string& text,
                 py::handle parameters, bool same, py::handle dx, py::handle dy, py::handle dparameters, int threads) {
  const PairInputs in(x, y);
  const Array values = input(v, "v", 3), upstream = input(grad, "grad", 3);
  require_dtype(values, "v", in.x.dtype);
  require_dtype(upstream, "grad", in.x.dtype);
  require_shape(values, "v", {in.batches(), in.m(), values.shape[2]});
  require_shape(upstream, "grad", {in.batches(), in.n(), values.shape[2]});
  const Program program = parse_program(text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Gradients<T> g(in, program, same, dx, dy, dparameters);
    const Team team(threads, in.batches() * in.work());
    g.for_each(in, team.threads, of<T>(ops()).matmul_grad, [&](int64_t b, int t) {
      return MatmulGradParams<T>{rows_of(in.x, b),
                                 rows_of(in.y, b),
                                 rows_of(values, b),
                                 rows_of(upstream, b),
                                 &program,
                                 same,
                                 moved(g.dx, b * in.n() * in.d()),
                                 moved(g.dy, b * in.m() * in.d()),
                                 g.dparameters,
                                 t};
    });
  });
}

/// The points of both sides, (n, d) and (n, e) of one dtype, and their kernels.
struct HsicInputs {
  const Array x, y;
  const Program program_x, program_y;
  HsicInputs(py::handle x_, py::handle y_, py::handle parameters_x, py::handle parameters_y, const std::string& text_x,
             const std::string& text_y)
      : x(input(x_, "x", 2)),
        y(input(y_, "y", 2)),
        program_x(parse_program(text_x, parameters_x, x.shape[1])),
        program_y(parse_program(text_y, parameters_y, y.shape[1])) {
    require_dtype(y, "y", x.dtype);
    require_shape(y, "y", {n(), y.shape[1]});
  }
  int64_t n() const { return x.shape[0]; }
  double work() const { return work_of(x, x) + work_of(y, y); }
};

void hsic(py::handle x, py::handle y, py::handle parameters_x, py::handle parameters_y, const std::string& program_x,
          const std::string& program_y, bool diagonal, py::handle values, int threads) {
  const HsicInputs in(x, y, parameters_x, parameters_y, program_x, program_y);
  double* out = output<double>(values, "values", {3 + 2 * in.n()});
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Team team(threads, in.work());
    of<T>(ops()).hsic({{rows_of(in.x), rows_of(in.y)}, {&in.program_x, &in.program_y}, diagonal, out, team.threads});
  });
}

void hsic_grad(py::handle x, py::handle y, py::handle parameters_x, py::handle parameters_y,
               const std::string& program_x, const std::string& program_y, bool diagonal, py::handle values,
               py::handle grad, py::handle dx, py::handle dy, py::handle dparameters_x, py::handle dparameters_y,
               int threads) {
  const HsicInputs in(x, y, parameters_x, parameters_y, program_x, program_y);
  const double* found = output<double>(values, "values", {3 + 2 * in.n()});
  const double* upstream = output<double>(grad, "grad", {3});
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T *to_x = optional_output<T>(dx, "dx", {in.n(), in.x.shape[1]}),
      *to_y = optional_output<T>(dy, "dy", {in.n(), in.y.shape[1]});
    double *to_px = optional_output<double>(dparameters_x, "dparameters_x", {in.program_x.parameters}),
           *to_py = optional_output<double>(dparameters_y, "dparameters_y", {in.program_y.parameters});
    const Team team(threads, in.work());
    of<T>(ops()).hsic_grad({{rows_of(in.x), rows_of(in.y)},
                            {&in.program_x, &in.program_y},
                            diagonal,
                            found,
                            upstream,
                            {to_x, to_y},
                            {to_px, to_py},
                            team.threads});
  });
}

}  // namespace

void register_kernels(py::module_& m) {
  using py::arg;
  m.def("gram", gram, arg("x"), arg("y"), arg("program"), arg("parameters"), arg("same"), arg("out"), arg("threads"),
        "out[b, i, j] = k(x[b, i], y[b, j]) for a kernel given as a program.");
  m.def("gram_grad", gram_grad, arg("x"), arg("y"), arg("program"), arg("parameters"), arg("same"), arg("grad"),
        arg("dx"), arg("dy"), arg("dparameters"), arg("threads"),
        "Adds the gradient of <grad, gram(x, y)> to dx (same: of both sets), dy and dparameters; None: not wanted.");
  m.def("matmul", matmul, arg("x"), arg("y"), arg("v"), arg("program"), arg("parameters"), arg("same"), arg("out"),
        arg("threads"), "out = K(x, y) v for a kernel given as a program.");
  m.def("matmul_grad", matmul_grad, arg("x"), arg("y"), arg("v"), arg("grad"), arg("program"), arg("parameters"),
        arg("same"), arg("dx"), arg("dy"), arg("dparameters"), arg("threads"),
        "Adds the gradient of <grad, K(x, y) v> to dx (same: of both sets), dy and dparameters; None: not wanted.");
  m.def("hsic", hsic, arg("x"), arg("y"), arg("parameters_x"), arg("parameters_y"), arg("program_x"), arg("program_y"),
        arg("diagonal"), arg("values"), arg("threads"),
        "values = sums of K' L', K'^2, L'^2 of two centred kernel matrices, and what centres each.");
  m.def("hsic_grad", hsic_grad, arg("x"), arg("y"), arg("parameters_x"), arg("parameters_y"), arg("program_x"),
        arg("program_y"), arg("diagonal"), arg("values"), arg("grad"), arg("dx"), arg("dy"), arg("dparameters_x"),
        arg("dparameters_y"), arg("threads"),
        "Adds the gradient of <grad, the sums of hsic> to dx, dy and the parameters'; None: not wanted.");
}

}  // namespace nearfar
