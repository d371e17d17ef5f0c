// The words of hopper.hpp on the CPU, by what the PTX ISA says of them (sections "mbarrier", "cp.async.bulk",
// "wgmma.mma_async"). What is asynchronous happens as late as it may: products when they are waited for, copies to
// global memory too; copies to shared memory at once, or if NEARFAR_EMULATE_ORDER is odd when their barrier is waited
// for. So a missing wait, and memory that is written while it is still to be read, show in the result.
//
// Not modelled: fences between proxies, the visibility of barriers to the copy engine, banks.
#pragma once

#include "cuda/number.hpp"

struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace nearfar::cuda {

namespace emulation {
uint32_t shared_address(const void* at);
void barrier_init(uint64_t* barrier, int count);
void barrier_arrive(uint64_t* barrier);
void barrier_expect(uint64_t* barrier, int bytes);
void barrier_wait(uint64_t* barrier, int parity);
void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier);
void bulk_store(void* to, const void* from, int bytes);
void bulk_add(float* to, const void* from, int bytes);
void bulk_stored();
void wgmma_begin();
enum class Operand { bf16, f16, tf32 };
/// c += a b as descriptors say, b of so many columns. fresh: c = a b.
void wgmma(float* c, int columns, uint64_t a, uint64_t b, Operand type, bool transpose_a, bool transpose_b, bool fresh);
/// The same of float16, a in registers; lines of b lie along the sum.
void wgmma_registers(float* c, int columns, const uint32_t* a, uint64_t b, bool fresh);
void wgmma_commit();
void wgmma_wait(int left);
void store_word(uint32_t address, uint32_t bits);
void copy_piece(void* to, uint32_t address);
}  // namespace emulation

using emulation::barrier_arrive;
using emulation::barrier_expect;
using emulation::barrier_init;
using emulation::barrier_wait;
using emulation::bulk_add;
using emulation::bulk_load;
using emulation::bulk_store;
using emulation::shared_address;
using emulation::wgmma_begin;
using emulation::wgmma_commit;

template <int COUNT>
inline void take_registers() {}
template <int COUNT>
inline void give_registers() {}
inline void barrier_fence() {}
inline void fence_async() {}
template <bool LEFT>
inline void bulk_stored() {
  emulation::bulk_stored();
}
template <int LEFT>
inline void wgmma_wait() {
  emulation::wgmma_wait(LEFT);
}
template <int N>
inline void wgmma_fence(float (&)[N][4]) {}
template <int N>
inline void wgmma_fence(uint32_t (&)[N][4]) {}
template <class E, bool TRANSPOSE_A, bool TRANSPOSE_B, int N>
inline void wgmma(float (&c)[N][4], uint64_t a, uint64_t b) {
  using emulation::Operand;
  emulation::wgmma(&c[0][0], 8 * N, a, b, std::is_same_v<E, F16> ? Operand::f16 : Operand::bf16, TRANSPOSE_A,
                   TRANSPOSE_B, false);
}
/// Halves of one object, one behind the other.
template <class E>
inline void wgmma(float (&c)[16][4], float (&)[16][4], uint64_t a, uint64_t b) {
  using emulation::Operand;
  emulation::wgmma(&c[0][0], 256, a, b, std::is_same_v<E, F16> ? Operand::f16 : Operand::bf16, false, false, false);
}
inline void wgmma_tf32(float (&c)[16][4], uint64_t a, uint64_t b, bool fresh) {
  emulation::wgmma(&c[0][0], 128, a, b, emulation::Operand::tf32, false, false, fresh);
}
inline void wgmma_registers(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool fresh) {
  emulation::wgmma_registers(&c[0][0], 128, a, b, fresh);
}

template <class E>
inline uint32_t pack_pair(float low, float high) {
  return narrow<E>(low).bits | static_cast<uint32_t>(narrow<E>(high).bits) << 16;
}
inline void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  const int lane = emulation::thread() % kWarp;
  for (int q = 0; q < 4; ++q) emulation::store_word(shuffle(address, 8 * q + lane / 4) + lane % 4 * 4, r[q]);
}
inline void copy_piece(void* to, uint32_t address) { emulation::copy_piece(to, address); }
inline float2 load_pair(const float* at) { return {at[0], at[1]}; }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float reciprocal_fast(float x) { return 1 / x; }

}  // namespace nearfar::cuda
