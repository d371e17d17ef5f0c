// The submodule `cuda`: the operations on device memory, with the signatures of the CPU's. Where those take a number of
// threads, these take `where`: (stream, exact, strip bytes, allocate), allocate(bytes) giving a workspace of the
// caller's library. Nothing waits for the device, so sums come back in arrays.
#if defined(NEARFAR_WITH_CUDA)
#include <pybind11/stl.h>

#include <vector>

#include "bindings/cuda_call.hpp"
#include "bindings/program.hpp"

namespace nearfar {
namespace cuda_bindings {

/// As PairInputs, of one device.
struct DevicePairs {
  Call call;
  Array x, y;
  DevicePairs(py::handle x_, py::handle y_) : x(call.input(x_, "x", 3)), y(call.points(y_, "y", 3, x)) {
    require_shape(y, "y", {x.shape[0], y.shape[1], x.shape[2]});
  }
  int64_t batches() const { return x.shape[0]; }
  int64_t n() const { return x.shape[1]; }
  int64_t m() const { return y.shape[1]; }
  int64_t d() const { return x.shape[2]; }
  int64_t results(bool condensed) const { return condensed ? n() * (n() - 1) / 2 : n() * m(); }
  template <class T>
  T* result(py::handle out, const char* name, bool condensed) {
    if (condensed) return call.output<T>(out, name, {batches(), results(true)});
    return call.output<T>(out, name, {batches(), n(), m()});
  }
};

void store(py::handle x, py::handle y, const std::string& map, double power, bool normalize, bool same, bool condensed,
           py::handle out, const py::tuple& where) {
  DevicePairs in(x, y);
  if ((same || condensed) && in.n() != in.m()) refuse_value("y", "expected the rows of x");
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* data = in.result<T>(out, "out", condensed);
    const PairMap pair_map = map_of(map);
    for (int64_t b = 0; b < in.batches() && in.results(condensed) > 0; ++b)
      in.call.run(where, [&](cuda::Context& c) {
        cuda::store<T>(c, {rows_of(in.x, b), rows_of(in.y, b), pair_map, normalize, same || condensed, condensed,
                           data + b * in.results(condensed), 0, power});
      });
  });
}

void store_grad(py::handle x, py::handle y, const std::string& map, double power, bool normalize, bool same,
                bool condensed, py::handle value, py::handle grad, py::handle dx, py::handle dy,
                const py::tuple& where) {
  DevicePairs in(x, y);
  if (same || condensed) require_same(in, dy);
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *values = in.result<T>(value, "value", condensed), *grads = in.result<T>(grad, "grad", condensed);
    T *x_out = in.call.gradient<T>(dx, "dx", in.x), *y_out = in.call.gradient<T>(dy, "dy", in.y);
    if (dx.is_none()) refuse_value("dx", "expected with that of y");
    if (same || condensed) y_out = x_out;
    const PairMap pair_map = map_of(map);
    for (int64_t b = 0; b < in.batches() && in.results(condensed) > 0; ++b)
      in.call.run(where, [&](cuda::Context& c) {
        cuda::store_grad<T>(c, {rows_of(in.x, b), rows_of(in.y, b), pair_map, normalize, same || condensed, condensed,
                                values + b * in.results(condensed), grads + b * in.results(condensed),
                                x_out + b * in.n() * in.d(), y_out ? y_out + b * in.m() * in.d() : nullptr, 0, power});
      });
  });
}

/// A kernel's program; its parameters may lie on the device, and are not read here then.
struct DeviceProgram {
  const Array values;
  const double* at = nullptr;
  const Program program;
  DeviceProgram(Call& call, const std::string& text, py::handle parameters, int64_t depth)
      : values(borrow(parameters, "parameters", {DType::f64})), program(parse_program(text, values, depth)) {
    if (values.on_cpu() || program.parameters == 0) return;
    call.input(parameters, "parameters", 1, {DType::f64});
    if (!values.contiguous()) refuse_value("parameters", "expected a contiguous vector");
    at = values.as<const double>();
  }
};

/// What both gradients of a kernel write.
template <class T>
struct ProgramGradients {
  T *dx, *dy;
  double* dparameters;
  ProgramGradients(DevicePairs& in, const Program& program, bool same, py::handle x, py::handle y, py::handle p)
      : dx(in.call.gradient<T>(x, "dx", in.x)),
        dy(same ? dx : in.call.gradient<T>(y, "dy", in.y)),
        dparameters(p.is_none() ? nullptr : in.call.output<double>(p, "dparameters", {program.parameters})) {
    if (same) require_same(in, y);
  }
  template <class Params>
  void put(Params& p, const DevicePairs& in, int64_t b) const {
    p.dx = dx ? dx + b * in.n() * in.d() : nullptr;
    p.dy = dy ? dy + b * in.m() * in.d() : nullptr;
    p.dparameters = dparameters;
  }
};

void gram(py::handle x, py::handle y, const std::string& text, py::handle parameters, bool same, py::handle out,
          const py::tuple& where) {
  DevicePairs in(x, y);
  if (same && in.n() != in.m()) refuse_value("y", "expected the rows of x");
  const DeviceProgram kernel(in.call, text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* data = in.result<T>(out, "out", false);
    for (int64_t b = 0; b < in.batches() && in.results(false) > 0; ++b) {
      cuda::GramDevice<T> p{};
      p.x = rows_of(in.x, b);
      p.y = rows_of(in.y, b);
      p.program = &kernel.program;
      p.parameters_at = kernel.at;
      p.same = same;
      p.out = data + b * in.results(false);
      in.call.run(where, [&](cuda::Context& c) { cuda::gram<T>(c, p); });
    }
  });
}

void gram_grad(py::handle x, py::handle y, const std::string& text, py::handle parameters, bool same, py::handle grad,
               py::handle dx, py::handle dy, py::handle dparameters, const py::tuple& where) {
  DevicePairs in(x, y);
  const DeviceProgram kernel(in.call, text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* upstream = in.result<T>(grad, "grad", false);
    const ProgramGradients<T> gradients(in, kernel.program, same, dx, dy, dparameters);
    for (int64_t b = 0; b < in.batches() && in.results(false) > 0; ++b) {
      cuda::GramGradDevice<T> p{};
      p.x = rows_of(in.x, b);
      p.y = rows_of(in.y, b);
      p.program = &kernel.program;
      p.parameters_at = kernel.at;
      p.same = same;
      p.grad = upstream + b * in.results(false);
      gradients.put(p, in, b);
      in.call.run(where, [&](cuda::Context& c) { cuda::gram_grad<T>(c, p); });
    }
  });
}

void matmul(py::handle x, py::handle y, py::handle v, const std::string& text, py::handle parameters, bool same,
            py::handle out, const py::tuple& where) {
  DevicePairs in(x, y);
  if (same && in.n() != in.m()) refuse_value("y", "expected the rows of x");
  const Array values = in.call.points(v, "v", 3, in.x);
  require_shape(values, "v", {in.batches(), in.m(), values.shape[2]});
  const DeviceProgram kernel(in.call, text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t r = values.shape[2];
    T* data = in.call.output<T>(out, "out", {in.batches(), in.n(), r});
    for (int64_t b = 0; b < in.batches() && in.n() * r > 0; ++b) {
      cuda::MatmulDevice<T> p{};
      p.x = rows_of(in.x, b);
      p.y = rows_of(in.y, b);
      p.v = rows_of(values, b);
      p.program = &kernel.program;
      p.parameters_at = kernel.at;
      p.same = same;
      p.out = data + b * in.n() * r;
      in.call.run(where, [&](cuda::Context& c) { cuda::matmul<T>(c, p); });
    }
  });
}

void matmul_grad(py::handle x, py::handle y, py::handle v, py::handle grad, const std::string& text,
                 py::handle parameters, bool same, py::handle dx, py::handle dy, py::handle dparameters,
                 const py::tuple& where) {
  DevicePairs in(x, y);
  const Array values = in.call.points(v, "v", 3, in.x), upstream = in.call.points(grad, "grad", 3, in.x);
  require_shape(values, "v", {in.batches(), in.m(), values.shape[2]});
  require_shape(upstream, "grad", {in.batches(), in.n(), values.shape[2]});
  const DeviceProgram kernel(in.call, text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const ProgramGradients<T> gradients(in, kernel.program, same, dx, dy, dparameters);
    for (int64_t b = 0; b < in.batches() && in.results(false) > 0; ++b) {
      cuda::MatmulGradDevice<T> p{};
      p.x = rows_of(in.x, b);
      p.y = rows_of(in.y, b);
      p.v = rows_of(values, b);
      p.grad = rows_of(upstream, b);
      p.program = &kernel.program;
      p.parameters_at = kernel.at;
      p.same = same;
      gradients.put(p, in, b);
      in.call.run(where, [&](cuda::Context& c) { cuda::matmul_grad<T>(c, p); });
    }
  });
}

/// As HsicInputs, of one device.
struct DeviceSides {
  Call call;
  const Array x, y;
  const DeviceProgram program_x, program_y;
  DeviceSides(py::handle x_, py::handle y_, py::handle parameters_x, py::handle parameters_y, const std::string& text_x,
              const std::string& text_y)
      : x(call.input(x_, "x", 2)),
        y(call.points(y_, "y", 2, x)),
        program_x(call, text_x, parameters_x, x.shape[1]),
        program_y(call, text_y, parameters_y, y.shape[1]) {
    require_shape(y, "y", {n(), y.shape[1]});
  }
  int64_t n() const { return x.shape[0]; }
  template <class Params>
  Params params(bool diagonal) const {
    Params p{};
    p.points[0] = rows_of(x), p.points[1] = rows_of(y);
    p.program[0] = &program_x.program, p.program[1] = &program_y.program;
    p.parameters_at[0] = program_x.at, p.parameters_at[1] = program_y.at;
    p.diagonal = diagonal;
    return p;
  }
};

void hsic(py::handle x, py::handle y, py::handle parameters_x, py::handle parameters_y, const std::string& program_x,
          const std::string& program_y, bool diagonal, py::handle values, const py::tuple& where) {
  DeviceSides in(x, y, parameters_x, parameters_y, program_x, program_y);
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto p = in.params<cuda::HsicDevice<T>>(diagonal);
    p.values = in.call.output<double>(values, "values", {3 + 2 * in.n()});
    in.call.run(where, [&](cuda::Context& c) { cuda::hsic<T>(c, p); });
  });
}

void hsic_grad(py::handle x, py::handle y, py::handle parameters_x, py::handle parameters_y,
               const std::string& program_x, const std::string& program_y, bool diagonal, py::handle values,
               py::handle grad, py::handle dx, py::handle dy, py::handle dparameters_x, py::handle dparameters_y,
               const py::tuple& where) {
  DeviceSides in(x, y, parameters_x, parameters_y, program_x, program_y);
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto parameters = [&](py::handle out, const char* name, const DeviceProgram& own) {
      return out.is_none() ? nullptr : in.call.output<double>(out, name, {own.program.parameters});
    };
    auto p = in.params<cuda::HsicGradDevice<T>>(diagonal);
    p.values = in.call.output<double>(values, "values", {3 + 2 * in.n()});
    p.grad = in.call.output<double>(grad, "grad", {3});
    p.dpoints[0] = in.call.gradient<T>(dx, "dx", in.x), p.dpoints[1] = in.call.gradient<T>(dy, "dy", in.y);
    p.dparameters[0] = parameters(dparameters_x, "dparameters_x", in.program_x);
    p.dparameters[1] = parameters(dparameters_y, "dparameters_y", in.program_y);
    in.call.run(where, [&](cuda::Context& c) { cuda::hsic_grad<T>(c, p); });
  });
}

void select(py::handle x, py::handle y, const std::string& map, double power, bool normalize, bool exclude_self,
            int64_t k, py::handle value, py::handle index, const std::string&, const py::tuple& where) {
  DevicePairs in(x, y);
  const int64_t most = in.m() - (exclude_self ? 1 : 0);
  if (k < 1 || k > most) refuse_value("k", "expected 1 to " + std::to_string(most) + ", got " + std::to_string(k));
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* values = in.call.output<T>(value, "value", {in.batches(), in.n(), k});
    int64_t* indices = in.call.output<int64_t>(index, "index", {in.batches(), in.n(), k});
    const PairMap pair_map = map_of(map);
    for (int64_t b = 0; b < in.batches() && in.n() > 0; ++b)
      in.call.run(where, [&](cuda::Context& c) {
        cuda::select<T>(c, {rows_of(in.x, b), rows_of(in.y, b), pair_map, normalize, exclude_self, k,
                            values + b * in.n() * k, indices + b * in.n() * k, Screening::never, 0, power});
      });
  });
}

}  // namespace cuda_bindings

void register_cuda(py::module_& module) {
  using py::arg;
  py::module_ m = module.def_submodule("cuda", "The operations on device memory.");
  m.attr("emulated") =
#if defined(NEARFAR_EMULATE)
      true;
#else
      false;
#endif
  m.def("store", cuda_bindings::store, arg("x"), arg("y"), arg("map"), arg("power"), arg("normalize"), arg("same"),
        arg("condensed"), arg("out"), arg("where"));
  m.def("store_grad", cuda_bindings::store_grad, arg("x"), arg("y"), arg("map"), arg("power"), arg("normalize"),
        arg("same"), arg("condensed"), arg("value"), arg("grad"), arg("dx"), arg("dy"), arg("where"));
  m.def("gram", cuda_bindings::gram, arg("x"), arg("y"), arg("program"), arg("parameters"), arg("same"), arg("out"),
        arg("where"));
  m.def("gram_grad", cuda_bindings::gram_grad, arg("x"), arg("y"), arg("program"), arg("parameters"), arg("same"),
        arg("grad"), arg("dx"), arg("dy"), arg("dparameters"), arg("where"));
  m.def("matmul", cuda_bindings::matmul, arg("x"), arg("y"), arg("v"), arg("program"), arg("parameters"), arg("same"),
        arg("out"), arg("where"));
  m.def("matmul_grad", cuda_bindings::matmul_grad, arg("x"), arg("y"), arg("v"), arg("grad"), arg("program"),
        arg("parameters"), arg("same"), arg("dx"), arg("dy"), arg("dparameters"), arg("where"));
  m.def("hsic", cuda_bindings::hsic, arg("x"), arg("y"), arg("parameters_x"), arg("parameters_y"), arg("program_x"),
        arg("program_y"), arg("diagonal"), arg("values"), arg("where"));
  m.def("hsic_grad", cuda_bindings::hsic_grad, arg("x"), arg("y"), arg("parameters_x"), arg("parameters_y"),
        arg("program_x"), arg("program_y"), arg("diagonal"), arg("values"), arg("grad"), arg("dx"), arg("dy"),
        arg("dparameters_x"), arg("dparameters_y"), arg("where"));
  m.def("select", cuda_bindings::select, arg("x"), arg("y"), arg("map"), arg("power"), arg("normalize"),
        arg("exclude_self"), arg("k"), arg("value"), arg("index"), arg("screening"), arg("where"));
  register_cuda_losses(m);
  register_cuda_clusters(m);
}

}  // namespace nearfar
#endif
