// Scores that every coordinate of a pair enters by itself, and gradients through them. Neither is a matrix product: the
// scores are tiles of Simt, a gradient is a sum by one thread for every coordinate of every row. See
// cpu/coordinate.hpp.
#pragma once

#include "cuda/strip.hpp"

namespace nearfar {
inline namespace device {

/// Tiles of a score such as AbsoluteDifference, of rows that are packed without a centre.
template <class T, class Score, class Epilogue>
void launch_coordinates(cuda::Context& c, const Score& score, const Pairs<T, T>& pairs, const Block& b,
                        const Epilogue& epilogue) {
  const Operand<T, true> x{pairs.x.data + b.row * pairs.x.pitch, pairs.x.pitch};
  const Operand<T, true> y{pairs.y.data + b.column * pairs.y.pitch, pairs.y.pitch};
  launch_tiles<Simt<Score, T, 64>>(c, x, y, b.rows, b.columns, pairs.x.d, 1, epilogue, {score});
}

/// out_ik += sum_j pull(own_ik, other_jk, g_ij, aside of the value of (i, j)) of rows [row, row + rows) over [begin,
/// end): a thread for every (i, k). `of(i, j, grad, value)` gives the upstream gradient and the value of a pair. A row
/// with NaN has a gradient of NaN there, and touches no other.
template <class T, class Map, class Of>
struct CoordinateGradient {
  Map map;
  Of of;
  Packed<T, T> own, other;
  int64_t row, rows, begin, end;
  T* out;
  NEARFAR_DEVICE void operator()() const {
    const int64_t at = cuda::global_thread(), line = at / own.d, i = row + line, k = at % own.d;
    if (line >= rows || i >= own.n) return;
    const T x = own.data[i * own.pitch + k];
    const int64_t stop = end < other.n ? end : other.n;
    constexpr int64_t kRun = 256;  // summed apart: long sums keep their digits
    T total = 0;
    for (int64_t first = begin; first < stop; first += kRun) {
      const int64_t last = first + kRun < stop ? first + kRun : stop;
      T sum = 0;
      NEARFAR_ROLLED
      for (int64_t j = first; j < last; ++j) {
        T grad, value;
        of(i, j, grad, value);
        sum += map.pull(x, other.data[j * other.pitch + k], grad, map.aside(value));
      }
      total += sum;
    }
    out[i * own.d + k] += x == x ? total : x;
  }
};

/// In the place of a map, where the weights of the scores are known. Scores are symmetric.
template <class Score>
struct ScoreSlopes {
  template <class T>
  NEARFAR_DEVICE static T aside(T value) {
    return value;
  }
  template <class T>
  NEARFAR_DEVICE static T pull(T x, T y, T weight, T) {
    T by_x, by_y;
    Score::slopes(x, y, by_x, by_y);
    return weight * by_x;
  }
};

template <class T, class Map, class Of>
void add_coordinate_gradient(cuda::Context& c, const Map& map, const Of& of, const Packed<T, T>& own,
                             const Packed<T, T>& other, int64_t row, int64_t rows, int64_t begin, int64_t end, T* out) {
  c.launch_threads(rows * own.d, CoordinateGradient<T, Map, Of>{map, of, own, other, row, rows, begin, end, out});
}

}  // namespace device
}  // namespace nearfar
