#pragma once

namespace nearfar {

// The element types that the kernels read and write; u8 for masks.
enum class DType : int { f16, bf16, f32, f64, i32, i64, u8 };

inline constexpr int size_of(DType type) {
  if (type == DType::u8) return 1;
  if (type == DType::f16 || type == DType::bf16) return 2;
  return type == DType::f32 || type == DType::i32 ? 4 : 8;
}

}  // namespace nearfar
