// The words of portable.hpp on the CPU: every thread of a block is a fiber, blocks run one after the other.
//
// A developer's tool, never part of a package: it shows that kernels compute the right thing (indices, masks, barriers,
// fragment layouts), and nothing about speed or about a real memory system. Fibers of a launch run in the order that
// NEARFAR_EMULATE_ORDER (a seed; 0 is ascending) shuffles: a missing barrier shows as a result that depends on it. If
// its second bit is set, each half of a block runs ahead as far as it can.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define NEARFAR_DEVICE inline
#define NEARFAR_HOST_DEVICE inline
#define NEARFAR_SHARED static
#define NEARFAR_UNROLL
#define NEARFAR_ROLLED
#define NEARFAR_UNROLL_4

namespace nearfar::cuda {

namespace emulation {
/// large_bytes: of the memory that launch_large gives.
void run(int64_t blocks, void (*body)(const void*), const void* kernel, int threads = kThreads, int large_bytes = 0);
char* large_memory();
int thread();
int64_t block();
int64_t blocks();
void sync_block();
void sync_all();
void sync_warp();
void* slot(int lane);  // 64 bytes for every lane of the own warp
}  // namespace emulation

inline int thread_index() { return emulation::thread(); }
inline int64_t block_index() { return emulation::block(); }
inline int64_t block_count() { return emulation::blocks(); }
inline void sync_block() { emulation::sync_block(); }
inline void sync_all() { emulation::sync_all(); }
inline void sync_warp() { emulation::sync_warp(); }

template <class T>
inline T shuffle(T value, int lane) {
  std::memcpy(emulation::slot(emulation::thread() % kWarp), &value, sizeof(T));
  sync_warp();
  std::memcpy(&value, emulation::slot(lane), sizeof(T));
  sync_warp();
  return value;
}
template <class T>
inline T shuffle_xor(T value, int mask) {
  return shuffle(value, emulation::thread() % kWarp ^ mask);
}
template <class T>
inline T shuffle_up(T value, int delta) {
  const int lane = emulation::thread() % kWarp;
  return shuffle(value, lane < delta ? lane : lane - delta);
}
inline uint32_t ballot(bool value) {
  const uint32_t own = value;
  std::memcpy(emulation::slot(emulation::thread() % kWarp), &own, sizeof(own));
  sync_warp();
  uint32_t bits = 0, other;
  for (int lane = 0; lane < kWarp; ++lane) {
    std::memcpy(&other, emulation::slot(lane), sizeof(other));
    bits |= other << lane;
  }
  sync_warp();
  return bits;
}
inline int lowest_bit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
inline int lowest_bit(uint64_t bits) { return __builtin_ffsll(static_cast<long long>(bits)) - 1; }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline void atomic_or(uint32_t* place, uint32_t bits) { *place |= bits; }
inline void atomic_add(int32_t* place, int32_t value) { *place += value; }
template <class T>
inline void atomic_min(T* place, T value) {
  if (value < *place) *place = value;
}
template <class T>
inline void atomic_max(T* place, T value) {
  if (value > *place) *place = value;
}

inline uint16_t float_to_half(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}
inline int opaque(int value) { return value; }
template <class T>
T at_most(T v, T most) {
  return v <= most;
}
template <class T, int N>
void store_together(T* to, const T (&v)[N]) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(v)) std::abort();
  std::memcpy(to, v, sizeof(v));
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
/// The fields of a float16 number as those of float32, the exponent moved by a product. The compiler's own is a call.
inline float half_to_float(uint16_t bits) {
  const uint32_t fields = (bits & 0x7fffu) << 13;
  const float size = fields < 0x0f800000u ? float_of(fields) * 0x1p112f : float_of(fields | 0x7f800000u);
  return float_of(bits_of(size) | (bits & 0x8000u) << 16);
}
inline uint16_t float_to_bfloat(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float round_tf32(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return value;
  return float_of((bits + 0x1000u) & 0xffffe000u);
}

struct KindBF16 {
  static float first(uint32_t pair) { return float_of(pair << 16); }
  static float second(uint32_t pair) { return float_of(pair & 0xffff0000u); }
};
struct KindF16 {
  static float first(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair)); }
  static float second(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair >> 16)); }
};
struct KindTF32 {};

namespace emulation {
struct Operands {
  uint32_t a[4], b[2];
};
inline Operands of(int lane) {
  Operands operands;
  std::memcpy(&operands, slot(lane), sizeof(operands));
  return operands;
}
inline void publish(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const Operands own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  std::memcpy(slot(thread() % kWarp), &own, sizeof(own));
  sync_warp();
}
}  // namespace emulation

/// 16-bit operands, depth 16.
template <class Kind>
inline void mma(Kind, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::publish(a, b);
  const int g = emulation::thread() % kWarp / 4, t = emulation::thread() % 4;
  for (int q = 0; q < 4; ++q) {  // the four lanes that hold depths 2 q, 2 q + 1 and 2 q + 8, 2 q + 9
    const emulation::Operands row = emulation::of(4 * g + q);
    for (int column = 0; column < 2; ++column) {
      const emulation::Operands other = emulation::of(4 * (2 * t + column) + q);
      for (int half = 0; half < 2; ++half)
        for (int lower = 0; lower < 2; ++lower) {
          const uint32_t x = row.a[2 * half + lower], y = other.b[half];
          c[2 * lower + column] += Kind::first(x) * Kind::first(y) + Kind::second(x) * Kind::second(y);
        }
    }
  }
  sync_warp();
}
/// tf32 operands, depth 8.
inline void mma(KindTF32, float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::publish(a, b);
  const int g = emulation::thread() % kWarp / 4, t = emulation::thread() % 4;
  for (int q = 0; q < 4; ++q) {  // the four lanes that hold depths q and q + 4
    const emulation::Operands row = emulation::of(4 * g + q);
    for (int column = 0; column < 2; ++column) {
      const emulation::Operands other = emulation::of(4 * (2 * t + column) + q);
      for (int half = 0; half < 2; ++half)
        for (int lower = 0; lower < 2; ++lower)
          c[2 * lower + column] +=
              float_of(row.a[2 * half + lower] & 0xffffe000u) * float_of(other.b[half] & 0xffffe000u);
    }
  }
  sync_warp();
}

template <bool TRANSPOSE>
inline void load_matrices(uint32_t (&r)[4], const uint16_t* row) {
  const int lane = emulation::thread() % kWarp;
  std::memcpy(emulation::slot(lane), &row, sizeof(row));
  sync_warp();
  for (int q = 0; q < 4; ++q) {
    uint16_t pair[2];
    for (int k = 0; k < 2; ++k) {
      const int of_row = TRANSPOSE ? 2 * (lane % 4) + k : lane / 4, at = TRANSPOSE ? lane / 4 : 2 * (lane % 4) + k;
      const uint16_t* source;
      std::memcpy(&source, emulation::slot(8 * q + of_row), sizeof(source));
      pair[k] = source[at];
    }
    r[q] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  sync_warp();
}

}  // namespace nearfar::cuda
