// Losses: value, and gradients into buffers the caller has allocated (and zeroed).
#include "bindings/call.hpp"

namespace nearfar {
namespace {

/// An optional gradient buffer of the shape of `like`; None is null.
template <class T>
T* gradient(py::handle out, const char* name, const Array& like) {
  if (out.is_none()) return nullptr;
  return static_cast<T*>(output(out, name, sizeof(T) == 8 ? DType::f64 : DType::f32, like.shape, like.ndim));
}

py::tuple softmax(const std::string& mode, py::handle x_, py::handle y_, py::handle positive_, int64_t positive_shift,
                  bool positive_is_column, bool positive_in_sum, py::handle paired_, py::handle ids_x, py::handle ids_y,
                  double scale, bool normalize, py::handle weights, double weight, py::handle loss, py::handle dx,
                  py::handle dy, py::handle dpositive, py::handle dpaired, int64_t strip_budget, int threads) {
  const Array x = input(x_, "x", 2), y = input(y_, "y", 2);
  const auto [n, d] = std::pair(x.shape[0], x.shape[1]);
  require_dtype(y, "y", x.dtype);
  require_shape(y, "y", {y.shape[0], d});
  Array positive, paired, codes_x, codes_y;
  if (!positive_.is_none()) {
    positive = input(positive_, "positive", 2);
    require_dtype(positive, "positive", x.dtype);
    require_shape(positive, "positive", {n, d});
  }
  if (!paired_.is_none()) {
    paired = input(paired_, "paired", 2);
    require_dtype(paired, "paired", x.dtype);
    require_shape(paired, "paired", {paired.shape[0], d});
    if (n ? paired.shape[0] % n : paired.shape[0]) refuse_value("paired", "expected as many rows for every row of x");
  }
  if (!ids_x.is_none()) {
    codes_x = input(ids_x, "ids_x", 1, {DType::i32});
    codes_y = input(ids_y, "ids_y", 1, {DType::i32});
    require_shape(codes_x, "ids_x", {n});
    require_shape(codes_y, "ids_y", {y.shape[0]});
    if (!codes_x.contiguous() || !codes_y.contiguous()) refuse_value("ids", "expected contiguous codes");
  }
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    SoftmaxParams<T> p{};
    p.mode = mode == "rows" ? SoftmaxMode::rows : mode == "both" ? SoftmaxMode::both : SoftmaxMode::pairs;
    if ((mode != "rows" && y.shape[0] != n) || (positive_is_column && y.shape[0] < n))
      refuse_value("y", "expected as many rows as x");
    p.x = rows_of(x);
    p.y = rows_of(y);
    if (positive.ndim) p.positive = rows_of(positive);
    p.positive_shift = positive_shift;
    p.positive_is_column = positive_is_column;
    p.positive_in_sum = positive_in_sum;
    if (paired.ndim) {
      p.paired = rows_of(paired);
      p.paired_per_row = n ? paired.shape[0] / n : 0;
    }
    if (codes_x.ndim) p.ids_x = codes_x.as<int32_t>(), p.ids_y = codes_y.as<int32_t>();
    p.scale = scale;
    p.normalize = normalize;
    p.weights = weights_of<T>(weights, n);
    p.weight = weight;
    p.loss = output<T>(loss, "loss", {n});
    p.dx = gradient<T>(dx, "dx", x);
    p.dy = gradient<T>(dy, "dy", y);
    p.dpositive = positive.ndim ? gradient<T>(dpositive, "dpositive", positive) : nullptr;
    p.dpaired = paired.ndim ? gradient<T>(dpaired, "dpaired", paired) : nullptr;
    if (!dx.is_none() && (dy.is_none() || (positive.ndim && dpositive.is_none()) || (paired.ndim && dpaired.is_none())))
      refuse_value("dx", "expected all gradients or none");
    p.strip_budget = strip_budget;
    p.threads = threads;
    {
      py::gil_scoped_release release;
      of<T>(ops()).softmax(p);
    }
    return py::make_tuple(p.loss_sum, p.dscale);
  });
}

double potential(py::handle x_, double t, bool normalize, py::handle dx, int threads) {
  const Array x = input(x_, "x", 2);
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    PotentialParams<T> p{rows_of(x), t, normalize, 0, gradient<T>(dx, "dx", x), threads};
    py::gil_scoped_release release;
    of<T>(ops()).potential(p);
    return p.log_sum;
  });
}

double alignment(py::handle x_, py::handle y_, double alpha, bool normalize, py::handle weights, double weight,
                 py::handle value, py::handle dx, py::handle dy, int threads) {
  const Array x = input(x_, "x", 2), y = input(y_, "y", 2);
  require_dtype(y, "y", x.dtype);
  require_shape(y, "y", {x.shape[0], x.shape[1]});
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    AlignmentParams<T> p{};
    p.x = rows_of(x);
    p.y = rows_of(y);
    p.alpha = alpha;
    p.normalize = normalize;
    p.weights = weights_of<T>(weights, x.shape[0]);
    p.weight = weight;
    p.value = output<T>(value, "value", {x.shape[0]});
    p.dx = gradient<T>(dx, "dx", x);
    p.dy = gradient<T>(dy, "dy", y);
    p.threads = threads;
    py::gil_scoped_release release;
    of<T>(ops()).alignment(p);
    return p.value_sum;
  });
}

}  // namespace

void register_losses(py::module_& m) {
  using py::arg;
  m.def("softmax", softmax, arg("mode"), arg("x"), arg("y"), arg("positive"), arg("positive_shift"),
        arg("positive_is_column"), arg("positive_in_sum"), arg("paired"), arg("ids_x"), arg("ids_y"), arg("scale"),
        arg("normalize"), arg("weights"), arg("weight"), arg("loss"), arg("dx"), arg("dy"), arg("dpositive"),
        arg("dpaired"), arg("strip_budget"), arg("threads"),
        "Losses of a softmax over pairs and their gradients; returns (sum of losses, gradient of scale).");
  m.def("potential", potential, arg("x"), arg("t"), arg("normalize"), arg("dx"), arg("threads"),
        "log of the sum over i < j of exp(-t |x_i - x_j|^2), and its gradient.");
  m.def("alignment", alignment, arg("x"), arg("y"), arg("alpha"), arg("normalize"), arg("weights"), arg("weight"),
        arg("value"), arg("dx"), arg("dy"), arg("threads"), "|x_i - y_i|^alpha, its sum and gradients.");
}

}  // namespace nearfar
