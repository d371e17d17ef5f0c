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

void store_grad(py::handle x, py::handle y, const std::string& map, double power, bool normalize, bool condensed,
                py::handle value, py::handle grad, py::handle dx, py::handle dy, const py::tuple& where) {
  DevicePairs in(x, y);
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *values = in.result<T>(value, "value", condensed), *grads = in.result<T>(grad, "grad", condensed);
    T *x_out = in.call.gradient<T>(dx, "dx", in.x), *y_out = in.call.gradient<T>(dy, "dy", in.y);
    const PairMap pair_map = map_of(map);
    for (int64_t b = 0; b < in.batches() && in.results(condensed) > 0; ++b)
      in.call.run(where, [&](cuda::Context& c) {
        cuda::store_grad<T>(
            c, {rows_of(in.x, b), rows_of(in.y, b), pair_map, normalize, condensed, values + b * in.results(condensed),
                grads + b * in.results(condensed), x_out + b * in.n() * in.d(), y_out + b * in.m() * in.d(), 0, power});
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
  ProgramGradients(DevicePairs& in, const Program& program, py::handle x, py::handle y, py::handle p)
      : dx(in.call.gradient<T>(x, "dx", in.x)),
        dy(in.call.gradient<T>(y, "dy", in.y)),
        dparameters(p.is_none() ? nullptr : in.call.output<double>(p, "dparameters", {program.parameters})) {}
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

void gram_grad(py::handle x, py::handle y, const std::string& text, py::handle parameters, py::handle grad,
               py::handle dx, py::handle dy, py::handle dparameters, const py::tuple& where) {
  DevicePairs in(x, y);
  const DeviceProgram kernel(in.call, text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* upstream = in.result<T>(grad, "grad", false);
    const ProgramGradients<T> gradients(in, kernel.program, dx, dy, dparameters);
    for (int64_t b = 0; b < in.batches() && in.results(false) > 0; ++b) {
      cuda::GramGradDevice<T> p{};
      p.x = rows_of(in.x, b);
      p.y = rows_of(in.y, b);
      p.program = &kernel.program;
      p.parameters_at = kernel.at;
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
                 py::handle parameters, py::handle dx, py::handle dy, py::handle dparameters, const py::tuple& where) {
  DevicePairs in(x, y);
  const Array values = in.call.points(v, "v", 3, in.x), upstream = in.call.points(grad, "grad", 3, in.x);
  require_shape(values, "v", {in.batches(), in.m(), values.shape[2]});
  require_shape(upstream, "grad", {in.batches(), in.n(), values.shape[2]});
  const DeviceProgram kernel(in.call, text, parameters, in.d());
  with_compute_type(in.x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const ProgramGradients<T> gradients(in, kernel.program, dx, dy, dparameters);
    for (int64_t b = 0; b < in.batches() && in.results(false) > 0; ++b) {
      cuda::MatmulGradDevice<T> p{};
      p.x = rows_of(in.x, b);
      p.y = rows_of(in.y, b);
      p.v = rows_of(values, b);
      p.grad = rows_of(upstream, b);
      p.program = &kernel.program;
      p.parameters_at = kernel.at;
      gradients.put(p, in, b);
      in.call.run(where, [&](cuda::Context& c) { cuda::matmul_grad<T>(c, p); });
    }
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

/// `scale` is a number, or a 0-d float64 array on the device. `ids_x`: the ids (int64) of the rows; `ids_y` is not
/// needed. sums (2): of the losses, and the gradient of scale.
void softmax(const std::string& mode, py::handle x_, py::handle y_, py::handle positive_, int64_t positive_shift,
             bool positive_is_column, bool positive_in_sum, py::handle paired_, py::handle ids_x, py::handle ids_y,
             py::handle scale, bool normalize, py::handle weights, double weight, py::handle loss, py::handle dx,
             py::handle dy, py::handle dpositive, py::handle dpaired, int64_t, py::handle sums,
             const py::tuple& where) {
  Call call;
  const Array x = call.input(x_, "x", 2), y = call.points(y_, "y", 2, x);
  const auto [n, d] = std::pair(x.shape[0], x.shape[1]);
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
    if (!dx.is_none() && (dy.is_none() || (positive.ndim && dpositive.is_none()) || (paired.ndim && dpaired.is_none())))
      refuse_value("dx", "expected all gradients or none");
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
    if (dx.is_none() != dy.is_none()) refuse_value("dx", "expected all gradients or none");
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
        arg("condensed"), arg("value"), arg("grad"), arg("dx"), arg("dy"), arg("where"));
  m.def("gram", cuda_bindings::gram, arg("x"), arg("y"), arg("program"), arg("parameters"), arg("same"), arg("out"),
        arg("where"));
  m.def("gram_grad", cuda_bindings::gram_grad, arg("x"), arg("y"), arg("program"), arg("parameters"), arg("grad"),
        arg("dx"), arg("dy"), arg("dparameters"), arg("where"));
  m.def("matmul", cuda_bindings::matmul, arg("x"), arg("y"), arg("v"), arg("program"), arg("parameters"), arg("same"),
        arg("out"), arg("where"));
  m.def("matmul_grad", cuda_bindings::matmul_grad, arg("x"), arg("y"), arg("v"), arg("grad"), arg("program"),
        arg("parameters"), arg("dx"), arg("dy"), arg("dparameters"), arg("where"));
  m.def("select", cuda_bindings::select, arg("x"), arg("y"), arg("map"), arg("power"), arg("normalize"),
        arg("exclude_self"), arg("k"), arg("value"), arg("index"), arg("screening"), arg("where"));
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
  register_cuda_clusters(m);
}

}  // namespace nearfar
#endif
