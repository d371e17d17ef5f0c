// Where a call runs: the stream and the workspace that the caller has given, and what the machine is like.
//
// An operation runs twice through the same code: first measuring (no base: take() only counts, launch() does nothing),
// then for real. So what it needs and what it uses cannot differ, and nothing here allocates device memory.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/portable.hpp"

namespace nearfar::cuda {

/// What an operation may know of the device when it chooses shapes.
struct Device {
  int architecture = 80;  // 10 * major + minor
  int multiprocessors = 108;
};

class Context {
 public:
  Context(void* base, int64_t size, void* stream, bool exact, int64_t strip_bytes, const Device& device)
      : exact(exact),
        strip_bytes(strip_bytes),
        device(device),
        base_(static_cast<char*>(base)),
        size_(size),
        stream_(stream) {}

  /// `count` numbers of the workspace, aligned, not initialised.
  template <class T>
  T* take(int64_t count) {
    const int64_t begin = used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    if (measuring()) return reinterpret_cast<T*>(kAlign + begin);
    if (used_ > size_) throw std::logic_error("workspace: smaller than was measured");
    return reinterpret_cast<T*>(base_ + begin);
  }
  int64_t used() const { return used_; }
  bool measuring() const { return base_ == nullptr; }

  template <class Body>
  void launch(int64_t blocks, const Body& body) const;  // below, where kernels are compiled
  /// The same with `bytes` of shared memory, whose start, at a multiple of 1024, the body is given. Body::kResident
  /// blocks of Body::kThreads share a multiprocessor.
  template <class Body>
  void launch_large(int64_t blocks, int bytes, const Body& body) const;
  bool hopper() const { return device.architecture == 90; }
  /// One thread, or one warp, for each of `count` things.
  template <class Body>
  void launch_threads(int64_t count, const Body& body) const {
    launch((count + kThreads - 1) / kThreads, body);
  }
  template <class Body>
  void launch_warps(int64_t count, const Body& body) const {
    launch((count + kWarps - 1) / kWarps, body);
  }

  const bool exact;           // float32 inputs keep float32 accuracy; else tf32
  const int64_t strip_bytes;  // about the most that a block of weights takes
  const Device device;

 private:
  static constexpr int64_t kAlign = 256;
  char* base_;
  int64_t size_, used_ = 0;
  void* stream_;
};

#if defined(__CUDACC__)
// One block a multiprocessor is enough to ask for, where the body does not: else the assembler spills registers to make
// room for more.
template <class Body, class = void>
inline constexpr int kResident = 1;
template <class Body>
inline constexpr int kResident<Body, std::void_t<decltype(Body::kResident)>> = Body::kResident;
template <class Body>
__global__ void __launch_bounds__(kThreads, kResident<Body>) kernel(const __grid_constant__ Body body) {
  body();
}

template <class Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kResident) large_kernel(const __grid_constant__ Body body) {
  extern __shared__ char memory[];
  body(memory + (1024 - __cvta_generic_to_shared(memory) % 1024) % 1024);
}
#endif

#if defined(NEARFAR_DEVICE)
#if defined(NEARFAR_EMULATE)
template <class Body>
void Context::launch_large(int64_t blocks, int bytes, const Body& body) const {
  if (measuring() || blocks == 0) return;
  emulation::run(
      blocks, [](const void* kernel) { (*static_cast<const Body*>(kernel))(emulation::large_memory()); }, &body,
      Body::kThreads, bytes);
}
#else
inline void expect_success(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
template <class Body>
void launch_kernel(void (*kernel)(Body), int64_t blocks, int threads, int bytes, void* stream, const Body& body) {
  void* arguments[] = {const_cast<Body*>(&body)};
  expect_success(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                  dim3(static_cast<unsigned>(threads)), arguments, static_cast<size_t>(bytes),
                                  static_cast<cudaStream_t>(stream)));
}
template <class Body>
void Context::launch_large(int64_t blocks, int bytes, const Body& body) const {
  if (measuring() || blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("CUDA: more than 2^31 blocks");
  bytes += 1024;
  expect_success(cudaFuncSetAttribute(reinterpret_cast<const void*>(&large_kernel<Body>),
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  launch_kernel(&large_kernel<Body>, blocks, Body::kThreads, bytes, stream_, body);
}
#endif

template <class Body>
void Context::launch(int64_t blocks, const Body& body) const {
  if (measuring() || blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("CUDA: more than 2^31 blocks");
#if defined(NEARFAR_EMULATE)
  emulation::run(blocks, [](const void* kernel) { (*static_cast<const Body*>(kernel))(); }, &body);
#else
  launch_kernel(&kernel<Body>, blocks, kThreads, 0, stream_, body);
#endif
}
#endif

}  // namespace nearfar::cuda
