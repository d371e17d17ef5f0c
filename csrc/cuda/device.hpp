// What the CUDA runtime says of this machine; answers softly where there is no driver.
#pragma once

#include <string>

#include "cuda/context.hpp"

namespace nearfar::cuda {

std::string compiled_version();  // "13.0"; "emulated" in a build without a GPU compiler
int device_count();              // 0 without a driver
Device device_of(int index);     // asked once for each

/// Launches go to this device while it lives.
class OnDevice {
 public:
  explicit OnDevice(int index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = -1;
};

}  // namespace nearfar::cuda
