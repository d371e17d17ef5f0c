// What the CUDA runtime says of this machine; answers softly where there is no driver.
#pragma once

#include <string>

namespace nearfar::cuda {

std::string compiled_version();  // "13.0"
int device_count();              // 0 without a driver

}  // namespace nearfar::cuda
