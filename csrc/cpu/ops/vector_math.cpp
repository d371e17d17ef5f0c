// exp, log, expm1, log1p, exp_flush, softplus and sigmoid (0 to 6) of cpu/vector.hpp over whole arrays: the door
// through which the tests reach every instruction set's versions. No kernel calls this.
#include <cstdint>
#include <cstring>

#include "cpu/vector.hpp"

namespace nearfar {
namespace {

// Whole vectors, then the tail padded to a vector.
template <class T, class F>
NEARFAR_INLINE void map_array(const T* x, T* y, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(y + i, f(load(x + i)));
  if (i == n) return;
  T tail[kLanes<T>] = {};
  std::memcpy(tail, x + i, (n - i) * sizeof(T));
  store(tail, f(load(tail)));
  std::memcpy(y + i, tail, (n - i) * sizeof(T));
}

template <class T>
NEARFAR_INLINE void apply(int function, const T* x, T* y, int64_t n) {
  switch (function) {
    case 0:
      return map_array(x, y, n, [](Vec<T> v) { return exp(v); });
    case 1:
      return map_array(x, y, n, [](Vec<T> v) { return log(v); });
    case 2:
      return map_array(x, y, n, [](Vec<T> v) { return expm1(v); });
    case 3:
      return map_array(x, y, n, [](Vec<T> v) { return log1p(v); });
    case 4:
      return map_array(x, y, n, [](Vec<T> v) { return exp_flush(v); });
    case 5:
      return map_array(x, y, n, [](Vec<T> v) { return softplus_sigmoid(v).softplus; });
    case 6:
      return map_array(x, y, n, [](Vec<T> v) { return softplus_sigmoid(v).sigmoid; });
  }
}

}  // namespace

namespace NEARFAR_ISA {

void vector_math(int function, const float* x, float* y, int64_t n) { apply(function, x, y, n); }
void vector_math(int function, const double* x, double* y, int64_t n) { apply(function, x, y, n); }

}  // namespace NEARFAR_ISA
}  // namespace nearfar
