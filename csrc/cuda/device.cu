#include <atomic>
#include <cstdlib>

#include "cuda/device.hpp"

namespace nearfar::cuda {

#if defined(NEARFAR_EMULATE)

std::string compiled_version() { return "emulated"; }
int device_count() { return 0; }
/// sm_80, or NEARFAR_EMULATE_ARCHITECTURE; few multiprocessors, so that small shapes take large tiles too.
Device device_of(int) {
  const char* architecture = std::getenv("NEARFAR_EMULATE_ARCHITECTURE");
  return {architecture ? std::atoi(architecture) : 80, 4};
}
OnDevice::OnDevice(int) {}
OnDevice::~OnDevice() = default;

#else

namespace {
void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}
}  // namespace

std::string compiled_version() {
  return std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

Device device_of(int index) {
  constexpr int kMost = 64;
  static std::atomic<int> known[kMost];  // architecture << 16 | multiprocessors
  int packed = index < kMost ? known[index].load() : 0;
  if (!packed) {
    int major = 0, minor = 0, count = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index));
    packed = (10 * major + minor) << 16 | count;
    if (index < kMost) known[index] = packed;
  }
  return {packed >> 16, packed & 0xffff};
}

OnDevice::OnDevice(int index) {
  int current = 0;
  check(cudaGetDevice(&current));
  if (current == index) return;
  check(cudaSetDevice(index));
  before_ = current;
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

#endif

}  // namespace nearfar::cuda
