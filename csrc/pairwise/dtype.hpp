// The element types that cross the Python boundary.
#pragma once

namespace nearfar {

enum class DType : int { f16, bf16, f32, f64, i32, i64 };

inline constexpr int size_of(DType type) {
  return type == DType::f64 || type == DType::i64 ? 8 : type == DType::f32 || type == DType::i32 ? 4 : 2;
}

}  // namespace nearfar
