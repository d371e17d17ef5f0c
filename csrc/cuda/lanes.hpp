// How the lanes of a warp go over a row: 16 bytes at once each where the row allows it, chosen once for the row. What
// is done with the numbers is said once for all ways.
#pragma once

#include "cuda/number.hpp"

namespace nearfar {
inline namespace device {

/// Rows of E whose pieces of 16 bytes are whole and aligned: a lane takes one at once, and holds it as it is, because
/// 16-bit numbers by themselves would take a register each.
template <class E>
struct Wide {
  static constexpr int kWide = Vector<E>::kSize;
  using Held = Vector<uint32_t>;
  NEARFAR_DEVICE static Held load(const E* from) { return *reinterpret_cast<const Held*>(from); }
  NEARFAR_DEVICE static E get(const Held& held, int e) {
    if constexpr (sizeof(E) == 2) return {static_cast<uint16_t>(held.v[e / 2] >> e % 2 * 16)};
    E value;
    memcpy(&value, held.v + e * sizeof(E) / sizeof(uint32_t), sizeof(E));
    return value;
  }
};
/// Any rows: a lane takes a number at once.
template <class T>
struct Single {
  static constexpr int kWide = 1;
  using Held = T;
};

NEARFAR_DEVICE bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % sizeof(Vector<char>) == 0; }

/// Numbers of a lane, side by side.
template <class T, int N>
struct Piece {
  T of[N];
  NEARFAR_DEVICE T& operator[](int e) { return of[e]; }
  NEARFAR_DEVICE const T& operator[](int e) const { return of[e]; }
};
/// To and from memory, which is aligned if N is not 1.
template <int N, class T>
NEARFAR_DEVICE Piece<T, N> load_piece(const T* from) {
  Piece<T, N> piece;
  if constexpr (N == 1) {
    piece[0] = *from;
  } else {
    constexpr int kSize = Vector<T>::kSize;
    NEARFAR_UNROLL
    for (int e = 0; e < N; e += kSize) {
      const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from + e);
      NEARFAR_UNROLL
      for (int q = 0; q < kSize; ++q) piece[e + q] = vector.v[q];
    }
  }
  return piece;
}
template <class E, class T, int N>
NEARFAR_DEVICE void store_piece(E* to, const Piece<T, N>& piece) {
  if constexpr (N == 1) {
    *to = narrow<E>(piece[0]);
  } else {
    constexpr int kSize = Vector<E>::kSize;
    static_assert(N % kSize == 0, "a piece is whole vectors");
    NEARFAR_UNROLL
    for (int e = 0; e < N; e += kSize) {
      Vector<E> vector;
      NEARFAR_UNROLL
      for (int q = 0; q < kSize; ++q) vector.v[q] = narrow<E>(piece[e + q]);
      *reinterpret_cast<Vector<E>*>(to + e) = vector;
    }
  }
}

/// M of them.
template <int M, class T, int N>
NEARFAR_DEVICE Piece<T, M> part_of(const Piece<T, N>& piece, int first) {
  Piece<T, M> part;
  NEARFAR_UNROLL
  for (int e = 0; e < M; ++e) part[e] = piece[first + e];
  return part;
}

/// f(k) for the numbers of a row, by a warp: k is the first of those that a lane takes. One piece at once: many warps,
/// which few registers allow, hide memory better than many loads of one.
template <class Way, class F>
NEARFAR_DEVICE void for_row(Way, int64_t d, F f) {
  NEARFAR_ROLLED
  for (int64_t k = cuda::lane_index() * Way::kWide; k < d; k += cuda::kWarp * Way::kWide) f(k);
}

/// f(how): `Wide` of the rows' type where `wide` says that they allow it, else `Single`. Once for a row. ONLY: of this
/// type alone.
template <class T, class ONLY = void, class F>
NEARFAR_DEVICE void choose_way(bool wide, DType dtype, F f) {
  const auto is = [&](auto element, DType own) {
    using E = decltype(element);
    if constexpr (std::is_void_v<ONLY> ? (sizeof(E) == 8) == (sizeof(T) == 8) : std::is_same_v<E, ONLY>)
      if (wide && dtype == own) return f(Wide<E>{}), true;
    return false;
  };
  if (!is(BF16{}, DType::bf16) && !is(F16{}, DType::f16) && !is(float{}, DType::f32) && !is(double{}, DType::f64))
    f(Single<T>{});
}

}  // namespace device
}  // namespace nearfar
