// What this build is and where it runs.
#include "bindings/call.hpp"
#if defined(NEARFAR_WITH_CUDA)
#include "cuda/device.hpp"
#endif

namespace nearfar {
namespace {

constexpr double kAnyWork = 1e18;  // is worth all threads

void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

py::dict build_info() {
  py::dict info;
  info["isa"] = ops().isa;
  info["vector_bytes"] = ops().vector_bytes;
  info["available_cpus"] = available_cpus();
#if defined(__clang__)
  info["compiler"] = std::string("clang ") + __clang_version__;
#else
  info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
#if defined(NEARFAR_WITH_CUDA)
  info["cuda"] = cuda::compiled_version();
  info["cuda_devices"] = cuda::device_count();
#else
  info["cuda"] = py::none();
  info["cuda_devices"] = 0;
#endif
#if defined(NDEBUG)
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  return info;
}

void vector_math(const std::string& function, py::handle x, py::handle out) {
  constexpr const char* kNames[] = {"exp", "log", "expm1", "log1p", "exp_flush", "softplus", "sigmoid"};
  constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);
  int which = 0;
  while (which < kCount && function != kNames[which]) ++which;
  if (which == kCount)
    refuse_value("function", "expected exp, log, expm1, log1p, exp_flush, softplus or sigmoid, got " + function);
  const Array a = input(x, "x", 1, {DType::f32, DType::f64});
  if (!a.contiguous()) refuse_value("x", "expected a contiguous array");
  with_compute_type(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    of<T>(ops()).vector_math(which, a.as<T>(), output<T>(out, "out", {a.shape[0]}), a.shape[0]);
  });
}

double fma_peak(int threads) {
  if (threads < 1 || threads > kMaxThreads) refuse_value("threads", "expected 1 to " + std::to_string(kMaxThreads));
  const Team team(threads, kAnyWork);
  return ops().fma_peak(threads);
}

py::list task_trace(int64_t tasks, int threads) {
  Buffer<int> worker(tasks);
  {
    const Team team(threads, kAnyWork);
    parallel_for(tasks, threads, [&](int64_t task, int w) { worker[task] = w; });
  }
  py::list out;
  for (int64_t t = 0; t < tasks; ++t) out.append(worker[t]);
  return out;
}

}  // namespace

void register_system(py::module_& m) {
  set_interrupt_check(check_signals);
  m.def("build_info", build_info, "Instruction set, compiler and CUDA of this build.");
  m.def("vector_math", vector_math, py::arg("function"), py::arg("x"), py::arg("out"),
        "exp, log, softplus and the like of a contiguous array, by the kernels' own code.");
  m.def("fma_peak", fma_peak, py::arg("threads"), "Measured float32 multiply-add rate in GFLOP/s.");
  m.def("task_trace", task_trace, py::arg("tasks"), py::arg("threads"), "The worker that ran each task.");
}

}  // namespace nearfar
