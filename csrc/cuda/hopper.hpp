// The words of sm_90a: barriers in shared memory, the bulk copy engine, warpgroup matrix products (PTX ISA, "mbarrier",
// "cp.async.bulk", "Asynchronous warpgroup level matrix instructions").
//
// Other architectures compile these as traps; plan.hpp never sends them there.
#pragma once

#include "cuda/number.hpp"

#if defined(NEARFAR_EMULATE)
#include "cuda/emulate_hopper.hpp"
#elif defined(__CUDACC__)
#include <cuda_bf16.h>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NEARFAR_SM90(code) code
#else
#define NEARFAR_SM90(code) __trap()
#endif

namespace nearfar::cuda {

NEARFAR_DEVICE uint32_t shared_address(const void* at) { return static_cast<uint32_t>(__cvta_generic_to_shared(at)); }

/// One phase ends when `count` threads have arrived and the bytes they announced have come.
NEARFAR_DEVICE void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
/// Makes initialised barriers known to the copy engine.
NEARFAR_DEVICE void barrier_fence() {
  NEARFAR_SM90(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}
NEARFAR_DEVICE void barrier_arrive(uint64_t* barrier) {
  NEARFAR_SM90(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"));
}
NEARFAR_DEVICE void barrier_expect(uint64_t* barrier, int bytes) {
  NEARFAR_SM90(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                            "r"(bytes) : "memory"));
}
NEARFAR_DEVICE void barrier_wait(uint64_t* barrier, int parity) {
  NEARFAR_SM90(
      asm volatile("{\n"
                   ".reg .pred done;\n"
                   "again:\n"
                   "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                   "@done bra ready;\n"
                   "bra again;\n"
                   "ready:\n"
                   "}" ::"r"(shared_address(barrier)),
                   "r"(parity) : "memory"));
}

/// By one thread: contiguous bytes to shared memory; the barrier counts them when they are there.
NEARFAR_DEVICE void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
  NEARFAR_SM90(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(to)),
                   "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)) : "memory"));
}
/// By one thread: float32 numbers of shared memory added to others, which nobody else adds to meanwhile.
NEARFAR_DEVICE void bulk_add(float* to, const void* from, int bytes) {
  NEARFAR_SM90(asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
      "r"(shared_address(from)), "r"(bytes) : "memory"));
  NEARFAR_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
}
/// By one thread: contiguous bytes from shared memory, which must stay until `bulk_stored`, by the same thread.
NEARFAR_DEVICE void bulk_store(void* to, const void* from, int bytes) {
  NEARFAR_SM90(
      asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(to)),
                   "r"(shared_address(from)), "r"(bytes) : "memory"));
  NEARFAR_SM90(asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
}
/// All such copies have left shared memory; else, have arrived.
template <bool LEFT>
NEARFAR_DEVICE void bulk_stored() {
  if (LEFT) {
    NEARFAR_SM90(asm volatile("cp.async.bulk.wait_group.read 0;" :: : "memory"));
  } else {
    NEARFAR_SM90(asm volatile("cp.async.bulk.wait_group 0;" :: : "memory"));
  }
}
/// What this thread has stored in shared memory, the copy engine may read after the next barrier.
NEARFAR_DEVICE void fence_async() { NEARFAR_SM90(asm volatile("fence.proxy.async.shared::cta;" :: : "memory")); }

/// Of a warpgroup, from here on: registers that others have given back.
template <int COUNT>
NEARFAR_DEVICE void take_registers() {
  NEARFAR_SM90(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT)));
}
template <int COUNT>
NEARFAR_DEVICE void give_registers() {
  NEARFAR_SM90(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT)));
}

NEARFAR_DEVICE void wgmma_begin() { NEARFAR_SM90(asm volatile("wgmma.fence.sync.aligned;" :: : "memory")); }
NEARFAR_DEVICE void wgmma_commit() { NEARFAR_SM90(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory")); }
template <int LEFT>
NEARFAR_DEVICE void wgmma_wait() {
  NEARFAR_SM90(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"));
}

/// Keeps the compiler from reading accumulators before the wait in front of this.
template <int N>
NEARFAR_DEVICE void wgmma_fence(float (&c)[N][4]) {
  NEARFAR_UNROLL
  for (int n = 0; n < N; ++n) NEARFAR_UNROLL
  for (int q = 0; q < 4; ++q) asm volatile("" : "+f"(c[n][q])::"memory");
}

/// Keeps the compiler from computing operands in registers behind this: not between wgmma_begin and a product.
template <int N>
NEARFAR_DEVICE void wgmma_fence(uint32_t (&a)[N][4]) {
  NEARFAR_UNROLL
  for (int n = 0; n < N; ++n) NEARFAR_UNROLL
  for (int q = 0; q < 4; ++q) asm volatile("" : "+r"(a[n][q])::"memory");
}

/// Two numbers that nobody writes meanwhile, in the order of the program: loads that the compiler moves together take
/// the accumulators' registers.
NEARFAR_DEVICE float2 load_pair(const float* at) {
  float2 pair;
  asm volatile("ld.global.nc.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "l"(at));
  return pair;
}

/// Rounded to E, two in a word.
template <class E>
NEARFAR_DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<E, BF16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}
/// Four 8 x 8 matrices of 16-bit numbers to shared memory: lane l has of matrix q the numbers (l / 4, 2 (l % 4)) and
/// the next, and gives the address of row l % 8 of matrix l / 8.
NEARFAR_DEVICE void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  NEARFAR_SM90(asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
                            "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory"));
}
/// 16 bytes of shared memory to global memory.
NEARFAR_DEVICE void copy_piece(void* to, uint32_t address) {
  asm volatile(
      "{\n"
      ".reg .b32 r<4>;\n"
      "ld.shared.v4.b32 {r0, r1, r2, r3}, [%1];\n"
      "st.global.v4.b32 [%0], {r0, r1, r2, r3};\n"
      "}" ::"l"(__cvta_generic_to_global(to)),
      "r"(address)
      : "memory");
}
/// 2^x, about 2 units in the last place; too small is zero.
NEARFAR_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x, about 1 unit in the last place.
NEARFAR_DEVICE float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#define NEARFAR_4(c) "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
#define NEARFAR_32(c, n)                                                                               \
  NEARFAR_4(c[n]), NEARFAR_4(c[n + 1]), NEARFAR_4(c[n + 2]), NEARFAR_4(c[n + 3]), NEARFAR_4(c[n + 4]), \
      NEARFAR_4(c[n + 5]), NEARFAR_4(c[n + 6]), NEARFAR_4(c[n + 7])
#define NEARFAR_SUMS(c) NEARFAR_32(c, 0), NEARFAR_32(c, 8)
#define NEARFAR_SUMS_TEXT                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NEARFAR_WIDE_SUMS(c) NEARFAR_SUMS(c), NEARFAR_32(c, 16), NEARFAR_32(c, 24)
#define NEARFAR_WIDE_SUMS_TEXT                                                             \
  NEARFAR_SUMS_TEXT                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "     \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
  "%125, %126, %127"
/// c += a b for a of 64 x 16 and b of 16 x 128 (or as many columns as c has), both of E. TRANSPOSE: lines lie along the
/// sum.
template <class E, bool TRANSPOSE_A, bool TRANSPOSE_B, int N>
NEARFAR_DEVICE void wgmma(float (&c)[N][4], uint64_t a, uint64_t b) {
  static_assert(N == 16 || N == 32, "128 or 256 columns");
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NEARFAR_WGMMA(columns, type, sums, text, first, second, third, fourth)                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." type "." type " {" text "}, %" first \
               ", %" second ", 1, 1, 1, %" third ", %" fourth ";"                                          \
               : sums(c)                                                                                   \
               : "l"(a), "l"(b), "n"(TRANSPOSE_A), "n"(TRANSPOSE_B))
#define NEARFAR_WGMMA_OF(type)                                                                         \
  if constexpr (N == 16) {                                                                             \
    NEARFAR_WGMMA("128", type, NEARFAR_SUMS, NEARFAR_SUMS_TEXT, "64", "65", "66", "67");               \
  } else {                                                                                             \
    NEARFAR_WGMMA("256", type, NEARFAR_WIDE_SUMS, NEARFAR_WIDE_SUMS_TEXT, "128", "129", "130", "131"); \
  }
  if constexpr (std::is_same_v<E, BF16>) {
    NEARFAR_WGMMA_OF("bf16")
  } else {
    NEARFAR_WGMMA_OF("f16")
  }
#undef NEARFAR_WGMMA_OF
#undef NEARFAR_WGMMA
#else
  __trap();
#endif
}
/// The same of 256 columns, half and half.
template <class E>
NEARFAR_DEVICE void wgmma(float (&c)[16][4], float (&beside)[16][4], uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NEARFAR_WGMMA(type)                                                                             \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" NEARFAR_WIDE_SUMS_TEXT \
               "}, %128, %129, 1, 1, 1, 0, 0;"                                                          \
               : NEARFAR_SUMS(c), NEARFAR_SUMS(beside)                                                  \
               : "l"(a), "l"(b))
  if constexpr (std::is_same_v<E, BF16>) {
    NEARFAR_WGMMA("bf16");
  } else {
    NEARFAR_WGMMA("f16");
  }
#undef NEARFAR_WGMMA
#else
  __trap();
#endif
}
/// The same of float16, a in registers, of every 16 rows a warp's as `mma` takes them (mma.hpp), which must stay until
/// the wait; lines of b lie along the sum. fresh: c = a b.
NEARFAR_DEVICE void wgmma_registers(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool fresh) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.eq.b32 adds, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NEARFAR_SUMS_TEXT
      "}, {%64, %65, %66, %67}, %68, adds, 1, 1, 1;\n"
      "}"
      : NEARFAR_SUMS(c)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(fresh)));
#else
  __trap();
#endif
}
/// The same of tf32, a of 64 x 8 and b of 8 x 128; only sums along lines. fresh: c = a b.
NEARFAR_DEVICE void wgmma_tf32(float (&c)[16][4], uint64_t a, uint64_t b, bool fresh) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile(
      "{\n"
      ".reg .pred adds;\n"
      "setp.eq.b32 adds, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {" NEARFAR_SUMS_TEXT
      "}, %64, %65, adds, 1, 1;\n"
      "}"
      : NEARFAR_SUMS(c)
      : "l"(a), "l"(b), "r"(static_cast<int>(fresh)));
#else
  __trap();
#endif
}
#undef NEARFAR_4
#undef NEARFAR_32
#undef NEARFAR_SUMS
#undef NEARFAR_SUMS_TEXT
#undef NEARFAR_WIDE_SUMS
#undef NEARFAR_WIDE_SUMS_TEXT

}  // namespace nearfar::cuda
#endif

#if defined(NEARFAR_DEVICE)
namespace nearfar::cuda {

constexpr float kLog2E = 1.44269504f;

/// A matrix in shared memory, swizzled by 128 bytes. `stride`: bytes from eight lines of 128 bytes to the next eight;
/// `leading`: where lines lie along the sum, bytes from 64 lines across it to the next 64.
NEARFAR_DEVICE uint64_t descriptor(const void* at, int leading, int stride) {
  const auto field = [](uint32_t bytes) { return static_cast<uint64_t>(bytes / 16 & 0x3fff); };
  return field(shared_address(at)) | field(leading) << 16 | field(stride) << 32 | uint64_t(1) << 62;
}

}  // namespace nearfar::cuda
#endif
