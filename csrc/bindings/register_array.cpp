#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "bindings/array.hpp"

// What the core makes of an array: for the tests, and for users who wonder.

namespace nearfar {

static py::tuple tuple_of(const int64_t* values, int count) {
  py::tuple tuple(count);
  for (int i = 0; i < count; ++i) tuple[i] = values[i];
  return tuple;
}

static py::dict array_info(py::handle obj, const std::string& name, std::optional<int> ndim) {
  const Array a = ndim ? input(obj, name.c_str(), *ndim) : borrow(obj, name.c_str());
  py::dict info;
  info["shape"] = tuple_of(a.shape, a.ndim);
  info["strides"] = tuple_of(a.strides, a.ndim);
  info["dtype"] = name_of(a.dtype);
  info["device"] = device_of(a);
  info["readonly"] = a.readonly;
  info["path"] = a.path;
  info["data"] = reinterpret_cast<uintptr_t>(a.data);
  return info;
}

static void check_output(py::handle obj, const std::vector<int64_t>& shape) {
  output(obj, "output", DType::f32, shape.data(), static_cast<int>(shape.size()));
}

void register_array(py::module_& m) {
  m.def("array_info", &array_info, py::arg("obj"), py::arg("name") = "array", py::arg("ndim") = py::none(),
        "How the core sees an array; with ndim, checked like a floating-point input of that many dimensions.");
  m.def("check_output", &check_output, py::arg("obj"), py::arg("shape"),
        "Refuse what is not a writable C-contiguous float32 array of this shape in CPU memory.");
}

}  // namespace nearfar
