// One strip of softmax scores on a Hopper GPU, by the kernel that multiplies during epilogues and by the one that does
// not: median ms of launches that take turns, TFLOP/s, and whether both leave the same bits.
//
//     nvcc -std=c++17 --expt-relaxed-constexpr -O3 -arch=sm_90a -I csrc -o overlap bench/cuda/overlap.cu && ./overlap
//
// Rows are random blocks as they lie in memory: the kernels do not care which row a number belongs to.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/softmax.hpp"

using namespace nearfar;

namespace {

constexpr int64_t kRows = 4096, kColumns = 32768;
constexpr int kTimes = 20;

void check(cudaError_t error) { cuda::expect_success(error); }

template <class T>
T* on_device(const std::vector<T>& values) {
  T* at = nullptr;
  check(cudaMalloc(&at, values.size() * sizeof(T)));
  check(cudaMemcpy(at, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return at;
}
template <class T>
T* filled(int64_t count, T value) {
  return on_device(std::vector<T>(static_cast<size_t>(count), value));
}

/// Of numbers between -1 and 1.
Blocked random_rows(int64_t rows, int64_t d) {
  uint64_t state = static_cast<uint64_t>(rows + d);
  std::vector<uint16_t> values(static_cast<size_t>(Blocked::size(rows, d)));
  for (uint16_t& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const float number = static_cast<float>(static_cast<int32_t>(state >> 32)) / 2147483648.0f;
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    value = static_cast<uint16_t>(bits >> 16);
  }
  return {on_device(values), ceil_div(d, Blocked::kColumns)};
}

template <class F>
float time_of(F f) {
  static const auto event = [] {
    cudaEvent_t made;
    check(cudaEventCreate(&made));
    return made;
  };
  static const cudaEvent_t begin = event(), end = event();
  check(cudaEventRecord(begin));
  f();
  check(cudaEventRecord(end));
  check(cudaEventSynchronize(end));
  float ms = 0;
  check(cudaEventElapsedTime(&ms, begin, end));
  return ms;
}

/// `left`, `size`: the bytes that an epilogue leaves.
template <class Epilogue>
void compare(cuda::Context& c, const char* name, Blocked x, Blocked y, int64_t d, const Epilogue& epilogue,
             const std::vector<std::pair<void*, size_t>>& left) {
  const BlockedOperand<true, BF16> of_x{x}, of_y{y};
  const int64_t tiles_m = kRows / 128, tiles_n = kColumns / 128, steps = ceil_div(d, Blocked::kColumns);
  const auto wide = [&] {
    launch_wide<WgmmaTwin<BF16>>(c, of_x, of_y, tiles_n, tiles_m, ceil_div(tiles_n, 2), steps, 1, epilogue);
  };
  const auto overlap = [&] { launch_overlap(c, of_x, of_y, tiles_m, tiles_n, steps, epilogue); };
  const auto bytes = [&](auto launch) {
    std::vector<std::vector<char>> values;
    for (const auto& [at, size] : left) check(cudaMemset(at, 0xff, size));
    launch();
    for (const auto& [at, size] : left) {
      values.emplace_back(size);
      check(cudaMemcpy(values.back().data(), at, size, cudaMemcpyDeviceToHost));
    }
    return values;
  };
  const bool same = bytes(wide) == bytes(overlap);
  std::vector<float> of_wide, of_overlap;
  for (int k = 0; k < kTimes; ++k) of_wide.push_back(time_of(wide)), of_overlap.push_back(time_of(overlap));
  std::sort(of_wide.begin(), of_wide.end()), std::sort(of_overlap.begin(), of_overlap.end());
  const double flops = 2.0 * kRows * kColumns * static_cast<double>(d);
  const auto rate = [&](float ms) { return flops / (1e9 * static_cast<double>(ms)); };
  const float before = of_wide[kTimes / 2], after = of_overlap[kTimes / 2];
  std::printf("%-28s D = %3lld  %.3f ms %4.0f TFLOP/s -> %.3f ms %4.0f TFLOP/s, %s bits\n", name,
              static_cast<long long>(d), before, rate(before), after, rate(after), same ? "the same" : "OTHER");
}

}  // namespace

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  cuda::Context c(reinterpret_cast<void*>(256), 0, nullptr, true, 0, {90, device.multiProcessorCount});
  const Block block{0, kRows, 0, kColumns};
  const int64_t tiles_m = kRows / 128, tiles_n = kColumns / 128, parts = kRows * tiles_n;
  auto *of_rows = filled(parts, PartialSum<float>{}), *of_columns = filled(kColumns * tiles_m, PartialSum<float>{});
  uint16_t* strip = filled(kRows * kColumns, uint16_t(0));
  const float *one = filled(kColumns, 1.0f), *small = filled(kColumns, 1e-3f);
  for (const int64_t d : {64, 128, 256}) {
    const Blocked x = random_rows(kRows, d), y = random_rows(kColumns, d);
    const float* factor = filled(kColumns, 1 / std::sqrt(static_cast<float>(d) / 3));  // about unit rows
    const MaskedScores<float> masked{{{}, {}, factor, factor, nullptr, nullptr, false, false, 0},
                                     {{nullptr, 1 / 0.07}},
                                     kRows,
                                     kColumns,
                                     0,
                                     false,
                                     nullptr,
                                     nullptr,
                                     0,
                                     true};
    const Weights<float> weights{nullptr, nullptr, 0, block, {strip, kColumns / 64}, one, one};
    const std::pair<void*, size_t> sums{of_rows, parts * 8}, column_sums{of_columns, kColumns * tiles_m * 8},
        stored{strip, kRows * kColumns * 2};
    compare(c, "exponentials and their sums", x, y, d,
            LseEpilogue<float, true>{masked, weights, block, tiles_m, tiles_n, of_rows, nullptr}, {sums, stored});
    compare(c, "sums of rows and columns", x, y, d,
            LseEpilogue<float, false>{masked, {}, block, tiles_m, tiles_n, of_rows, of_columns}, {sums, column_sums});
    compare(c, "weights", x, y, d, WeightEpilogue<float>{{masked, {one, small, one, small}}, weights}, {stored});
  }
}
