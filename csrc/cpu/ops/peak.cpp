// The rate of float32 multiply-adds that this instruction set reaches from registers: what every fraction in the
// benchmarks is a fraction of.
#include <chrono>

#include "cpu/threads.hpp"
#include "cpu/vector.hpp"

namespace nearfar {
namespace {

constexpr int kAccumulators = kRegisters == 32 ? 24 : 12;

/// `steps` multiply-adds on each of enough accumulators to hide their latency.
__attribute__((noinline)) float burn(int64_t steps) {
  Vec<float> sum[kAccumulators], a = splat<float>(0.999f), b = splat<float>(0.001f);
#pragma GCC unroll 24
  for (int u = 0; u < kAccumulators; ++u) sum[u] = splat<float>(static_cast<float>(u));
  for (int64_t k = 0; k < steps; ++k) {
#pragma GCC unroll 24
    for (int u = 0; u < kAccumulators; ++u) sum[u] = sum[u] * a + b;
  }
  Vec<float> total = sum[0];
#pragma GCC unroll 24
  for (int u = 1; u < kAccumulators; ++u) total += sum[u];
  return hsum<float>(total);
}

}  // namespace

namespace NEARFAR_ISA {

double fma_peak(int threads) {
  constexpr int64_t kSteps = 400000;
  volatile float sink = 0;
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](int64_t, int) { sink = burn(kSteps); });
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double flops = 2.0 * static_cast<double>(kSteps) * kAccumulators * kLanes<float> * threads;
    if (flops / seconds > best) best = flops / seconds;
  }
  return best / 1e9;
}

}  // namespace NEARFAR_ISA
}  // namespace nearfar
