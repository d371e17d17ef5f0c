// Losses on device memory: see register_cuda.cpp.
#if defined(NEARFAR_WITH_CUDA)
#include <pybind11/stl.h>

#include <vector>

#include "bindings/cuda_call.hpp"

namespace nearfar {
namespace cuda_bindings {

/// `scale` is a number, or a 0-d float64 array on the device. `ids_x`: the ids (int64) of the rows; `ids_y` is not
/// needed. sums (2): of the losses, and the gradient of scale.
void softmax(const std::string& mode, py::handle x_, py::handle y_, py::handle positive_, int64_t positive_shift,
             bool positive_is_column, bool positive_in_sum, py::handle paired_, py::handle ids_x, py::handle ids_y,
             py::handle scale, bool normalize, py::handle weights, double weight, py::handle loss, py::handle dx,
             py::handle dy, py::handle dpositive, py::handle dpaired, int64_t, py::handle sums,
             const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2), y = call.points(y_, "y", 2, x);
  const int64_t n = x.shape[0], d = x.shape[1];
  require_shape(y, "y", {y.shape[0], d});
  Array positive, paired;
  if (!positive_.is_none()) {
    positive = call.points(positive_, "positive", 2, x);
    require_shape(positive, "positive", {n, d});
  }
  if (!paired_.is_none()) {
    paired = call.points(paired_, "paired", 2, x);
    require_shape(paired, "paired", {paired.shape[0], d});
    if (n ? paired.shape[0] % n : paired.shape[0]) refuse_value("paired", "expected as many rows for every row of x");
  }
  if (!ids_y.is_none()) refuse_value("ids_y", "expected None");
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::SoftmaxDevice<T> p{};
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
    if (!ids_x.is_none()) p.ids = call.labels(ids_x, "ids", n);
    p.scale = call.number(scale, "scale", p.scale_at);
    p.normalize = normalize;
    p.weights = weights.is_none() ? nullptr : call.output<T>(weights, "weights", {n});
    p.weight = weight;
    p.loss = call.output<T>(loss, "loss", {n});
    p.dx = call.gradient<T>(dx, "dx", x);
    p.dy = call.gradient<T>(dy, "dy", y);
    p.dpositive = positive.ndim ? call.gradient<T>(dpositive, "dpositive", positive) : nullptr;
    p.dpaired = paired.ndim ? call.gradient<T>(dpaired, "dpaired", paired) : nullptr;
    if (dx.is_none() && !(dy.is_none() && dpositive.is_none() && dpaired.is_none()))
      refuse_value("dx", "expected with any other gradient");
    p.loss_total = call.output<double>(sums, "sums", {2});
    p.dscale_at = p.loss_total + 1;
    call.run(where, [&](cuda::Context& c) { cuda::softmax<T>(c, p); });
  });
}

/// `scale` and `bias` as `scale` of softmax. sums (3): of the losses, and the gradients of scale and bias.
void sigmoid(py::handle x_, py::handle y_, bool matched, py::handle scale, py::handle bias, bool normalize,
             py::handle weights, double weight, py::handle loss, py::handle dx, py::handle dy, py::handle sums,
             const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2), y = call.points(y_, "y", 2, x);
  require_shape(y, "y", {matched ? x.shape[0] : y.shape[0], x.shape[1]});
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::SigmoidDevice<T> p{};
    p.x = rows_of(x);
    p.y = rows_of(y);
    p.matched = matched;
    p.scale = call.number(scale, "scale", p.scale_at);
    p.bias = call.number(bias, "bias", p.bias_at);
    p.normalize = normalize;
    p.weights = weights.is_none() ? nullptr : call.output<T>(weights, "weights", {x.shape[0]});
    p.weight = weight;
    p.loss = call.output<T>(loss, "loss", {x.shape[0]});
    p.dx = call.gradient<T>(dx, "dx", x);
    p.dy = call.gradient<T>(dy, "dy", y);
    if (dx.is_none() && !dy.is_none()) refuse_value("dx", "expected with any other gradient");
    p.loss_total = call.output<double>(sums, "sums", {3});
    p.dscale_at = p.loss_total + 1;
    p.dbias_at = p.loss_total + 2;
    call.run(where, [&](cuda::Context& c) { cuda::sigmoid<T>(c, p); });
  });
}

/// Ids are int64. sums (1): the gradient of scale.
void softmax_block(py::handle x_, py::handle y_, bool same, py::handle ids_x, py::handle ids_y, py::handle scale,
                   bool normalize, py::handle lse_x, py::handle lse_y, py::handle weight_x, py::handle weight_y,
                   py::handle dx, py::handle dy, py::handle sums, const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2), y = call.points(y_, "y", 2, x);
  const int64_t n = x.shape[0], m = y.shape[0];
  require_shape(y, "y", {same ? n : m, x.shape[1]});
  if (ids_x.is_none() != ids_y.is_none()) refuse_value("ids_y", "expected ids of both or none");
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::SoftmaxBlockDevice<T> p{};
    p.x = rows_of(x);
    p.y = rows_of(y);
    p.same = same;
    if (!ids_x.is_none()) {
      p.own_ids = call.labels(ids_x, "ids_x", n);
      p.other_ids = call.labels(ids_y, "ids_y", m);
    }
    p.scale = call.number(scale, "scale", p.scale_at);
    p.normalize = normalize;
    p.lse_x = call.output<double>(lse_x, "lse_x", {n});
    if (!lse_y.is_none()) p.lse_y = call.output<double>(lse_y, "lse_y", {m});
    p.dx = call.gradient<T>(dx, "dx", x);
    p.dy = call.gradient<T>(dy, "dy", y);
    if (dx.is_none() != dy.is_none()) refuse_value("dx", "expected all gradients or none");
    if (p.dx) p.weight_x = call.output<double>(weight_x, "weight_x", {n});
    if (p.dx && p.lse_y) p.weight_y = call.output<double>(weight_y, "weight_y", {m});
    p.dscale_at = call.output<double>(sums, "sums", {1});
    call.run(where, [&](cuda::Context& c) { cuda::softmax_block<T>(c, p); });
  });
}

/// Labels are int64; `labels_x` None: the label of a row is its number. sums (1): the gradient of scale.
void labelled_lse(py::handle x_, py::handle y_, bool same, py::handle labels_x, py::handle labels_y, py::handle scale,
                  bool normalize, const std::vector<double>& maps, py::object power, py::handle lse, py::handle grad,
                  py::handle dx, py::handle dy, py::handle sums, const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2), y = call.points(y_, "y", 2, x);
  const int64_t n = x.shape[0], m = y.shape[0];
  require_shape(y, "y", {same ? n : m, x.shape[1]});
  if (maps.size() != 8) refuse_value("maps", "expected two times sign, q, r, shift");
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::LabelledLseDevice<T> p{};
    p.x = rows_of(x);
    p.y = rows_of(y);
    p.same = same;
    if (!labels_x.is_none()) p.ids_x = call.labels(labels_x, "labels_x", n);
    p.ids_y = call.labels(labels_y, "labels_y", m);
    p.scale = call.number(scale, "scale", p.scale_at);
    p.normalize = normalize;
    for (int k = 0; k < 2; ++k) p.maps[k] = {maps[4 * k], maps[4 * k + 1], maps[4 * k + 2], maps[4 * k + 3]};
    p.terms = power.is_none() ? 2 : 3;
    p.power = power.is_none() ? 0 : power.cast<double>();
    p.lse = call.output<double>(lse, "lse", {n, p.terms});
    p.dx = call.gradient<T>(dx, "dx", x);
    p.dy = call.gradient<T>(dy, "dy", y);
    if (p.dx) p.grad = call.output<double>(grad, "grad", {n, p.terms});
    if (dx.is_none() != dy.is_none()) refuse_value("dx", "expected all gradients or none");
    p.dscale_at = call.output<double>(sums, "sums", {1});
    call.run(where, [&](cuda::Context& c) { cuda::labelled_lse<T>(c, p); });
  });
}

/// `labels` (int64) or the mask are of items, of `views` rows each. sums (3): of the losses, the gradient of scale, and
/// how many rows have a positive.
void sup_con(py::handle x_, py::handle labels, py::handle mask_, int64_t views, py::handle scale, bool normalize,
             py::handle weights, bool mean, py::handle loss, py::handle dx, py::handle sums, const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2);
  const int64_t n = x.shape[0];
  if (views < 1 || n % views) refuse_value("views", "expected a divisor of the number of rows");
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::SupConDevice<T> p{};
    p.x = rows_of(x);
    p.positives.views = views;
    if (!labels.is_none()) p.labels = call.labels(labels, "labels", n / views);
    if (!mask_.is_none()) {
      const Array mask = call.input(mask_, "positive_mask", 2, {DType::u8});
      require_shape(mask, "positive_mask", {n / views, n / views});
      p.positives.mask = mask.as<uint8_t>();
      p.positives.mask_row_stride = mask.strides[0];
      p.positives.mask_col_stride = mask.strides[1];
    }
    p.scale = call.number(scale, "scale", p.scale_at);
    p.normalize = normalize;
    p.weights = weights.is_none() ? nullptr : call.output<T>(weights, "weights", {n});
    p.weight_of_mean = mean;
    p.loss = call.output<T>(loss, "loss", {n});
    p.dx = call.gradient<T>(dx, "dx", x);
    p.loss_total = call.output<double>(sums, "sums", {3});
    p.dscale_at = p.loss_total + 1;
    p.anchors_at = p.loss_total + 2;
    call.run(where, [&](cuda::Context& c) { cuda::sup_con<T>(c, p); });
  });
}

/// `labels` (int64) in place of codes; `begin`: where the pairs of every anchor begin, of semihard that is mined. sums
/// (2): sum or mean of losses, and the number of triplets.
void triplet(py::handle x_, py::handle labels, py::handle, const std::string& mining, double margin, bool squared,
             bool soft, bool normalize, py::handle weights, bool mean, py::handle value, py::handle dx,
             py::handle positive, py::handle negative, py::handle begin, py::handle sums, const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2);
  const int64_t n = x.shape[0];
  if (n > INT32_MAX) refuse_value("x", "expected less than 2^31 rows");
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::TripletDevice<T> p{};
    p.x = rows_of(x);
    p.labels = call.labels(labels, "labels", n);
    p.mining = mining_of(mining);
    p.margin = margin;
    p.squared = squared;
    p.soft = soft;
    p.normalize = normalize;
    p.weights = weights.is_none() ? nullptr : call.output<T>(weights, "weights", {n});
    p.mean = mean;
    p.value = call.output<T>(value, "value", {n});
    p.dx = call.gradient<T>(dx, "dx", x);
    if (!positive.is_none()) {
      if (p.mining == Mining::all) refuse_value("mining", "expected 'hard' or 'semihard'");
      const int64_t places = call.input(positive, "positive", 1, {DType::i64}).shape[0];
      if (p.mining == Mining::hard && places != n) refuse_value("positive", "expected a place for every row");
      p.positive = call.output<int64_t>(positive, "positive", {places});
      p.negative = call.output<int64_t>(negative, "negative", {places});
      if (p.mining == Mining::semihard) p.begin = call.labels(begin, "begin", n);
    }
    p.total = call.output<double>(sums, "sums", {2});
    p.count_at = p.total + 1;
    call.run(where, [&](cuda::Context& c) { cuda::triplet<T>(c, p); });
  });
}

void potential(py::handle x_, double t, bool normalize, py::handle dx, py::handle sums, const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2);
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::PotentialDevice<T> p{};
    p.x = rows_of(x);
    p.t = t;
    p.normalize = normalize;
    p.dx = call.gradient<T>(dx, "dx", x);
    p.log_sum_at = call.output<double>(sums, "sums", {1});
    call.run(where, [&](cuda::Context& c) { cuda::potential<T>(c, p); });
  });
}

void alignment(py::handle x_, py::handle y_, double alpha, bool normalize, py::handle weights, double weight,
               py::handle value, py::handle dx, py::handle dy, py::handle sums, const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2), y = call.points(y_, "y", 2, x);
  require_shape(y, "y", {x.shape[0], x.shape[1]});
  with_compute_type(x.dtype, [&](auto zero) {
    using T = decltype(zero);
    cuda::AlignmentDevice<T> p{};
    p.x = rows_of(x);
    p.y = rows_of(y);
    p.alpha = alpha;
    p.normalize = normalize;
    p.weights = weights.is_none() ? nullptr : call.output<T>(weights, "weights", {x.shape[0]});
    p.weight = weight;
    p.value = call.output<T>(value, "value", {x.shape[0]});
    p.dx = call.gradient<T>(dx, "dx", x);
    p.dy = call.gradient<T>(dy, "dy", y);
    p.value_total = call.output<double>(sums, "sums", {1});
    call.run(where, [&](cuda::Context& c) { cuda::alignment<T>(c, p); });
  });
}

}  // namespace cuda_bindings

void register_cuda_losses(py::module_& m) {
  using py::arg;
  m.def("softmax", cuda_bindings::softmax, arg("mode"), arg("x"), arg("y"), arg("positive"), arg("positive_shift"),
        arg("positive_is_column"), arg("positive_in_sum"), arg("paired"), arg("ids_x"), arg("ids_y"), arg("scale"),
        arg("normalize"), arg("weights"), arg("weight"), arg("loss"), arg("dx"), arg("dy"), arg("dpositive"),
        arg("dpaired"), arg("strip_budget"), arg("sums"), arg("where"));
  m.def("softmax_block", cuda_bindings::softmax_block, arg("x"), arg("y"), arg("same"), arg("ids_x"), arg("ids_y"),
        arg("scale"), arg("normalize"), arg("lse_x"), arg("lse_y"), arg("weight_x"), arg("weight_y"), arg("dx"),
        arg("dy"), arg("sums"), arg("where"));
  m.def("sigmoid", cuda_bindings::sigmoid, arg("x"), arg("y"), arg("matched"), arg("scale"), arg("bias"),
        arg("normalize"), arg("weights"), arg("weight"), arg("loss"), arg("dx"), arg("dy"), arg("sums"), arg("where"));
  m.def("labelled_lse", cuda_bindings::labelled_lse, arg("x"), arg("y"), arg("same"), arg("labels_x"), arg("labels_y"),
        arg("scale"), arg("normalize"), arg("maps"), arg("power"), arg("lse"), arg("grad"), arg("dx"), arg("dy"),
        arg("sums"), arg("where"));
  m.def("sup_con", cuda_bindings::sup_con, arg("x"), arg("labels"), arg("positive_mask"), arg("views"), arg("scale"),
        arg("normalize"), arg("weights"), arg("mean"), arg("loss"), arg("dx"), arg("sums"), arg("where"));
  m.def("triplet", cuda_bindings::triplet, arg("x"), arg("labels"), arg("classes"), arg("mining"), arg("margin"),
        arg("squared"), arg("soft"), arg("normalize"), arg("weights"), arg("mean"), arg("value"), arg("dx"),
        arg("positive"), arg("negative"), arg("begin"), arg("sums"), arg("where"));
  m.def("potential", cuda_bindings::potential, arg("x"), arg("t"), arg("normalize"), arg("dx"), arg("sums"),
        arg("where"));
  m.def("alignment", cuda_bindings::alignment, arg("x"), arg("y"), arg("alpha"), arg("normalize"), arg("weights"),
        arg("weight"), arg("value"), arg("dx"), arg("dy"), arg("sums"), arg("where"));
}

}  // namespace nearfar
#endif
