// The few words of CUDA that kernels use, so that the same kernels also compile as plain C++ (emulate.hpp).
//
// A kernel is a struct whose operator() const is run by kThreads threads of every block; it is launched by
// Context::launch. Threads of a block are a line; so are the blocks of a launch.
#pragma once

#include <cstdint>
#include <cstring>

namespace nearfar::cuda {

inline constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;

}  // namespace nearfar::cuda

// Whoever only calls the kernels, compiled by neither, has no use for the rest.
#if defined(NEARFAR_EMULATE)
#include "cuda/emulate.hpp"
#elif defined(__CUDACC__)

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define NEARFAR_DEVICE __device__ __forceinline__
#define NEARFAR_HOST_DEVICE __host__ __device__ __forceinline__
#define NEARFAR_SHARED __shared__
#define NEARFAR_UNROLL _Pragma("unroll")
#define NEARFAR_ROLLED _Pragma("unroll 1")
#define NEARFAR_UNROLL_4 _Pragma("unroll 4")

namespace nearfar::cuda {

NEARFAR_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
NEARFAR_DEVICE int64_t block_index() { return blockIdx.x; }
NEARFAR_DEVICE int64_t block_count() { return gridDim.x; }
/// The first kThreads: all of a block, but for a warpgroup that only copies (wgmma_wide.hpp).
NEARFAR_DEVICE void sync_block() { asm volatile("bar.sync 0, %0;" ::"n"(kThreads) : "memory"); }
NEARFAR_DEVICE void sync_all() { __syncthreads(); }
NEARFAR_DEVICE void sync_warp() { __syncwarp(); }

/// The value of lane ^ mask, of a given lane, of the lane `delta` before (own value where there is none).
template <class T>
NEARFAR_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
NEARFAR_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
NEARFAR_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
NEARFAR_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
NEARFAR_DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
NEARFAR_DEVICE int lowest_bit(uint64_t bits) { return __ffsll(static_cast<long long>(bits)) - 1; }
NEARFAR_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
NEARFAR_DEVICE void atomic_or(uint32_t* place, uint32_t bits) { atomicOr(place, bits); }
// Of integers, and of numbers that are not negative, whose bits are ordered as they are: the order does not matter.
NEARFAR_DEVICE void atomic_add(int32_t* place, int32_t value) { atomicAdd(place, value); }
NEARFAR_DEVICE void atomic_min(int32_t* place, int32_t value) { atomicMin(place, value); }
NEARFAR_DEVICE void atomic_min(float* place, float value) {
  atomicMin(reinterpret_cast<unsigned*>(place), __float_as_uint(value));
}
NEARFAR_DEVICE void atomic_max(float* place, float value) {
  atomicMax(reinterpret_cast<unsigned*>(place), __float_as_uint(value));
}
NEARFAR_DEVICE void atomic_min(double* place, double value) {
  atomicMin(reinterpret_cast<unsigned long long*>(place), static_cast<unsigned long long>(__double_as_longlong(value)));
}

NEARFAR_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
NEARFAR_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
NEARFAR_DEVICE uint16_t float_to_bfloat(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
/// Rounded to the 11 significant bits that a tf32 product reads.
NEARFAR_DEVICE float round_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}
/// The same number, computed here and known to nobody: what depends on it does not leave the loop around, to wait in
/// registers, and what is added to it is not added before it is.
NEARFAR_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
/// v <= most, as a number. The compiler would make two instructions of it.
NEARFAR_DEVICE float at_most(float v, float most) {
  float one;
  asm("set.le.f32.f32 %0, %1, %2;" : "=f"(one) : "f"(v), "f"(most));
  return one;
}
NEARFAR_DEVICE double at_most(double v, double most) { return v <= most; }
/// Numbers side by side in global memory, aligned as a whole, at once. The compiler would take the first ones of a
/// vector apart.
NEARFAR_DEVICE void store_together(float* to, const float (&v)[1]) { *to = v[0]; }
NEARFAR_DEVICE void store_together(float* to, const float (&v)[2]) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" : : "l"(to), "f"(v[0]), "f"(v[1]) : "memory");
}
NEARFAR_DEVICE void store_together(float* to, const float (&v)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}
NEARFAR_DEVICE void store_together(double* to, const double (&v)[2]) {
  asm volatile("st.global.v2.f64 [%0], {%1, %2};" : : "l"(to), "d"(v[0]), "d"(v[1]) : "memory");
}
NEARFAR_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
NEARFAR_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

struct KindBF16 {};
struct KindF16 {};
struct KindTF32 {};

// c[4] += a b on the tensor cores. Lane l holds, with g = l / 4 and t = l % 4: rows g and g + 8 of a, column g of b,
// columns 2 t and 2 t + 1 of rows g and g + 8 of c (PTX ISA, "Matrix Fragments for mma.m16n8k16 / m16n8k8").
NEARFAR_DEVICE void mma(KindBF16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
NEARFAR_DEVICE void mma(KindF16, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
NEARFAR_DEVICE void mma(KindTF32, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane l gives the address of row l % 8 of matrix l / 8 and
/// gets of matrix q the numbers (l / 4, 2 (l % 4)) and the next, or with TRANSPOSE (2 (l % 4), l / 4) and the one
/// below.
template <bool TRANSPOSE>
NEARFAR_DEVICE void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if (TRANSPOSE) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

}  // namespace nearfar::cuda
#endif

#if defined(NEARFAR_DEVICE)
namespace nearfar::cuda {

NEARFAR_DEVICE int lane_index() { return thread_index() % kWarp; }
NEARFAR_DEVICE int warp_index() { return thread_index() / kWarp; }
NEARFAR_DEVICE int64_t global_warp() { return block_index() * kWarps + warp_index(); }
NEARFAR_DEVICE int64_t global_thread() { return block_index() * kThreads + thread_index(); }

template <class T>
NEARFAR_DEVICE T warp_sum(T value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

}  // namespace nearfar::cuda
#endif
