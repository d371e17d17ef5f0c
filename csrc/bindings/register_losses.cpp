// Losses: value, and gradients into buffers the caller has allocated (and zeroed).
#include <pybind11/stl.h>

#include <algorithm>
#include <vector>

#include "bindings/call.hpp"

namespace nearfar {
namespace {

/// An optional gradient buffer of the shape of `like`; None is null.
template <class T>
T* gradient(py::handle out, const char* name, const Array& like) {
  if (out.is_none()) return nullptr;
  return static_cast<T*>(output(out, name, sizeof(T) == 8 ? DType::f64 : DType::f32, like.shape, like.ndim));
}

/// Contiguous int32 codes of the rows, or null for None.
const int32_t* codes(py::handle given, const char* name, int64_t rows) {
  if (given.is_none()) return nullptr;
  const Array array = input(given, name, 1, {DType::i32});
  require_shape(array, name, {rows});
  if (!array.contiguous()) refuse_value(name, "expected contiguous codes");
  return array.as<int32_t>();
}

int64_t dense_codes(py::handle labels, py::handle codes) {
  const Array a = input(labels, "labels", 1, {DType::i64});
  int32_t* out = output<int32_t>(codes, "codes", {a.shape[0]});
  std::vector<int64_t> distinct(a.shape[0]);
  for (int64_t i = 0; i < a.shape[0]; ++i) distinct[i] = a.as<int64_t>()[i * a.strides[0]];
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  for (int64_t i = 0; i < a.shape[0]; ++i) {
    const auto place = std::lower_bound(distinct.begin(), distinct.end(), a.as<int64_t>()[i * a.strides[0]]);
    out[i] = static_cast<int32_t>(place - distinct.begin());
  }
  return static_cast<int64_t>(distinct.size());
}

py::tuple softmax(const std::string& mode, py::handle x_, py::handle y_, py::handle positive_, int64_t positive_shift,
                  bool positive_is_column, bool positive_in_sum, py::handle paired_, py::handle ids_x, py::handle ids_y,
                  double scale, bool normalize, py::handle weights, double weight, py::handle loss, py::handle dx,
                  py::handle dy, py::handle dpositive, py::handle dpaired, int64_t strip_budget, int threads) {
  const Array x = input(x_, "x", 2), y = input(y_, "y", 2);
  const int64_t n = x.shape[0], d = x.shape[1];
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
    if (dx.is_none() && !(dy.is_none() && dpositive.is_none() && dpaired.is_none()))
      refuse_value("dx", "expected with any other gradient");
    p.strip_budget = strip_budget;
    {
      const Team team(threads, work_of(x, y) + (paired.ndim ? paired.shape[0] * d : 0));
      p.threads = team.threads;
      of<T>(ops()).softmax(p);
    }
    return py::make_tuple(p.loss_sum, p.dscale);
  });
}

double softmax_block(py::handle x_, py::handle y_, bool same, py::handle ids_x, py::handle ids_y, double scale,
                     bool normalize, py::handle lse_x, py::handle lse_y, py::handle weight_x, py::handle weight_y,
                     py::handle dx, py::handle dy, int threads) {
  const Array x = input(x_, "x", 2), y = input(y_, "y", 2);
  const int64_t n = x.shape[0], m = y.shape[0], d = x.shape[1];
  require_dtype(y, "y", x.dtype);
  require_shape(y, "y", {same ? n : m, d});
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    SoftmaxBlockParams<T> p{};
    p.x = rows_of(x);
    p.y = rows_of(y);
    p.same = same;
    p.ids_x = codes(ids_x, "ids_x", n);
    p.ids_y = codes(ids_y, "ids_y", m);
    if (!p.ids_x != !p.ids_y) refuse_value("ids_y", "expected ids of both or none");
    p.scale = scale;
    p.normalize = normalize;
    p.lse_x = output<double>(lse_x, "lse_x", {n});
    if (!lse_y.is_none()) p.lse_y = output<double>(lse_y, "lse_y", {m});
    p.dx = gradient<T>(dx, "dx", x);
    p.dy = gradient<T>(dy, "dy", y);
    if (dx.is_none() != dy.is_none()) refuse_value("dx", "expected all gradients or none");
    if (p.dx) p.weight_x = output<double>(weight_x, "weight_x", {n});
    if (p.dx && p.lse_y) p.weight_y = output<double>(weight_y, "weight_y", {m});
    const Team team(threads, work_of(x, y));
    p.threads = team.threads;
    of<T>(ops()).softmax_block(p);
    return p.dscale;
  });
}

double labelled_lse(py::handle x_, py::handle y_, bool same, py::handle labels_x, py::handle labels_y, double scale,
                    bool normalize, const std::vector<double>& maps, py::object power, py::handle lse, py::handle grad,
                    py::handle dx, py::handle dy, int threads) {
  const Array x = input(x_, "x", 2), y = input(y_, "y", 2);
  const int64_t n = x.shape[0], m = y.shape[0], d = x.shape[1];
  require_dtype(y, "y", x.dtype);
  require_shape(y, "y", {same ? n : m, d});
  const Array codes_x = input(labels_x, "labels_x", 1, {DType::i32}),
              codes_y = input(labels_y, "labels_y", 1, {DType::i32});
  require_shape(codes_x, "labels_x", {n});
  require_shape(codes_y, "labels_y", {m});
  if (!codes_x.contiguous() || !codes_y.contiguous()) refuse_value("labels", "expected contiguous codes");
  if (maps.size() != 8) refuse_value("maps", "expected two times sign, q, r, shift");
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    LabelledLseParams<T> p{};
    p.x = rows_of(x);
    p.y = rows_of(y);
    p.same = same;
    p.labels_x = codes_x.as<int32_t>();
    p.labels_y = codes_y.as<int32_t>();
    p.scale = scale;
    p.normalize = normalize;
    for (int k = 0; k < 2; ++k) p.maps[k] = {maps[4 * k], maps[4 * k + 1], maps[4 * k + 2], maps[4 * k + 3]};
    p.terms = power.is_none() ? 2 : 3;
    p.power = power.is_none() ? 0 : power.cast<double>();
    p.lse = output<double>(lse, "lse", {n, p.terms});
    p.dx = gradient<T>(dx, "dx", x);
    p.dy = gradient<T>(dy, "dy", y);
    if (p.dx) p.grad = output<double>(grad, "grad", {n, p.terms});
    if (dx.is_none() != dy.is_none()) refuse_value("dx", "expected all gradients or none");
    const Team team(threads, work_of(x, y));
    p.threads = team.threads;
    of<T>(ops()).labelled_lse(p);
    return p.dscale;
  });
}

py::tuple sup_con(py::handle x_, py::handle classes_, py::handle mask_, int64_t views, double scale, bool normalize,
                  py::handle weights, bool mean, py::handle loss, py::handle dx, int threads) {
  const Array x = input(x_, "x", 2);
  const int64_t n = x.shape[0];
  Array classes, mask;
  if (!classes_.is_none()) {
    classes = input(classes_, "classes", 1, {DType::i32});
    require_shape(classes, "classes", {n});
    if (!classes.contiguous()) refuse_value("classes", "expected contiguous codes");
    for (int64_t i = 0; i < n; ++i)
      if (const int32_t code = classes.as<int32_t>()[i]; code < 0 || code >= n)
        refuse_value("classes", "expected codes from 0 to the number of rows, got " + std::to_string(code));
  } else {
    if (views < 1 || n % views) refuse_value("views", "expected a divisor of the number of rows");
    mask = input(mask_, "positive_mask", 2, {DType::u8});
    require_shape(mask, "positive_mask", {n / views, n / views});
  }
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    SoftmaxParams<T> p{};
    p.mode = SoftmaxMode::pairs;
    p.x = p.y = p.positive = rows_of(x);
    p.positive_is_column = true;
    if (classes.ndim) {
      p.positives.classes = classes.as<int32_t>();
    } else {
      p.positives.mask = mask.as<uint8_t>();
      p.positives.mask_row_stride = mask.strides[0];
      p.positives.mask_col_stride = mask.strides[1];
      p.positives.views = views;
    }
    p.scale = scale;
    p.normalize = normalize;
    p.weights = weights_of<T>(weights, n);
    p.weight = 1;
    p.weight_of_mean = mean;
    p.loss = output<T>(loss, "loss", {n});
    p.dx = p.dy = p.dpositive = gradient<T>(dx, "dx", x);
    {
      const Team team(threads, work_of(x, x));
      p.threads = team.threads;
      of<T>(ops()).softmax(p);
    }
    return py::make_tuple(p.loss_sum, p.dscale, p.anchors);
  });
}

py::tuple sigmoid(py::handle x_, py::handle y_, bool matched, double scale, double bias, bool normalize,
                  py::handle weights, double weight, py::handle loss, py::handle dx, py::handle dy, int threads) {
  const Array x = input(x_, "x", 2), y = input(y_, "y", 2);
  require_dtype(y, "y", x.dtype);
  require_shape(y, "y", {matched ? x.shape[0] : y.shape[0], x.shape[1]});
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    SigmoidParams<T> p{};
    p.x = rows_of(x);
    p.y = rows_of(y);
    p.matched = matched;
    p.scale = scale;
    p.bias = bias;
    p.normalize = normalize;
    p.weights = weights_of<T>(weights, x.shape[0]);
    p.weight = weight;
    p.loss = output<T>(loss, "loss", {x.shape[0]});
    p.dx = gradient<T>(dx, "dx", x);
    p.dy = gradient<T>(dy, "dy", y);
    if (dx.is_none() && !dy.is_none()) refuse_value("dx", "expected with any other gradient");
    {
      const Team team(threads, work_of(x, y));
      p.threads = team.threads;
      of<T>(ops()).sigmoid(p);
    }
    return py::make_tuple(p.loss_sum, p.dscale, p.dbias);
  });
}

double potential(py::handle x_, double t, bool normalize, py::handle dx, int threads) {
  const Array x = input(x_, "x", 2);
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    PotentialParams<T> p{rows_of(x), t, normalize, 0, gradient<T>(dx, "dx", x), threads};
    const Team team(threads, work_of(x, x));
    p.threads = team.threads;
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
    const Team team(threads, static_cast<double>(x.shape[0]) * x.shape[1]);
    p.threads = team.threads;
    of<T>(ops()).alignment(p);
    return p.value_sum;
  });
}

/// One triplet an anchor, or one for every ordered pair of a class.
int64_t places_of(Mining mining, const int32_t* codes, int64_t n, int64_t classes) {
  if (mining == Mining::hard) return n;
  Buffer<int64_t> sizes(classes);
  int64_t pairs = 0;
  for (int64_t c = 0; c < classes; ++c) sizes[c] = 0;
  for (int64_t i = 0; i < n; ++i) pairs += 2 * sizes[codes[i]]++;
  return pairs;
}

py::tuple triplet(py::handle x_, py::handle codes_, int64_t classes, const std::string& mining, double margin,
                  bool squared, bool soft, bool normalize, py::handle weights, bool mean, py::handle value,
                  py::handle dx, py::handle positive, py::handle negative, int64_t triplets, int threads) {
  const Array x = input(x_, "x", 2), codes = input(codes_, "codes", 1, {DType::i32});
  const int64_t n = x.shape[0];
  require_shape(codes, "codes", {n});
  if (!codes.contiguous()) refuse_value("codes", "expected contiguous codes");
  for (int64_t i = 0; i < n; ++i)
    if (codes.as<int32_t>()[i] < 0 || codes.as<int32_t>()[i] >= classes)
      refuse_value("codes", "expected 0 to " + std::to_string(classes - 1));
  return with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    TripletParams<T> p{};
    p.x = rows_of(x);
    p.codes = codes.as<int32_t>();
    p.classes = classes;
    p.mining = mining_of(mining);
    p.margin = margin;
    p.squared = squared;
    p.soft = soft;
    p.normalize = normalize;
    p.weights = weights_of<T>(weights, n);
    p.mean = mean;
    p.value = output<T>(value, "value", {n});
    p.dx = gradient<T>(dx, "dx", x);
    if (!positive.is_none()) {
      if (p.mining == Mining::all || triplets != places_of(p.mining, p.codes, n, classes))
        refuse_value("triplets", "expected as many places as triplets are mined");
      p.positive = output<int64_t>(positive, "positive", {triplets});
      p.negative = output<int64_t>(negative, "negative", {triplets});
    }
    {
      const Team team(threads, work_of(x, x));
      p.threads = team.threads;
      of<T>(ops()).triplet(p);
    }
    return py::make_tuple(p.value_sum, p.count);
  });
}

}  // namespace

void register_losses(py::module_& m) {
  using py::arg;
  m.def("dense_codes", dense_codes, arg("labels"), arg("codes"),
        "Labels as their places among the distinct ones, in order; returns how many those are.");
  m.def("softmax", softmax, arg("mode"), arg("x"), arg("y"), arg("positive"), arg("positive_shift"),
        arg("positive_is_column"), arg("positive_in_sum"), arg("paired"), arg("ids_x"), arg("ids_y"), arg("scale"),
        arg("normalize"), arg("weights"), arg("weight"), arg("loss"), arg("dx"), arg("dy"), arg("dpositive"),
        arg("dpaired"), arg("strip_budget"), arg("threads"),
        "Losses of a softmax over pairs and their gradients; returns (sum of losses, gradient of scale).");
  m.def("softmax_block", softmax_block, arg("x"), arg("y"), arg("same"), arg("ids_x"), arg("ids_y"), arg("scale"),
        arg("normalize"), arg("lse_x"), arg("lse_y"), arg("weight_x"), arg("weight_y"), arg("dx"), arg("dy"),
        arg("threads"),
        "Log-sum-exps of the rows and columns of a block, or gradients by the whole ones; returns that of scale.");
  m.def(
      "labelled_lse", labelled_lse, arg("x"), arg("y"), arg("same"), arg("labels_x"), arg("labels_y"), arg("scale"),
      arg("normalize"), arg("maps"), arg("power"), arg("lse"), arg("grad"), arg("dx"), arg("dy"), arg("threads"),
      "Log-sum-exps over the columns of a row's label and over the others, or their gradients; returns that of scale.");
  m.def("sup_con", sup_con, arg("x"), arg("classes"), arg("positive_mask"), arg("views"), arg("scale"),
        arg("normalize"), arg("weights"), arg("mean"), arg("loss"), arg("dx"), arg("threads"),
        "SupCon of classes or a mask of positives; returns (sum of losses, gradient of scale, anchors).");
  m.def("sigmoid", sigmoid, arg("x"), arg("y"), arg("matched"), arg("scale"), arg("bias"), arg("normalize"),
        arg("weights"), arg("weight"), arg("loss"), arg("dx"), arg("dy"), arg("threads"),
        "Sigmoid loss over pairs; returns (sum of losses, gradient of scale, gradient of bias).");
  m.def("potential", potential, arg("x"), arg("t"), arg("normalize"), arg("dx"), arg("threads"),
        "log of the sum over i < j of exp(-t |x_i - x_j|^2), and its gradient.");
  m.def("alignment", alignment, arg("x"), arg("y"), arg("alpha"), arg("normalize"), arg("weights"), arg("weight"),
        arg("value"), arg("dx"), arg("dy"), arg("threads"), "|x_i - y_i|^alpha, its sum and gradients.");
  m.def("triplet", triplet, arg("x"), arg("codes"), arg("classes"), arg("mining"), arg("margin"), arg("squared"),
        arg("soft"), arg("normalize"), arg("weights"), arg("mean"), arg("value"), arg("dx"), arg("positive"),
        arg("negative"), arg("triplets"), arg("threads"),
        "Triplet losses of a labelled batch, gradient and mined indices; returns (sum or mean, number of triplets).");
}

}  // namespace nearfar
