// Masks: a predicate on pairs, evaluated on the block of scores. Never an N x M array.
#pragma once

#include <limits>

#include "cpu/strip.hpp"

namespace nearfar {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Which columns are left out of the denominator of which rows.
template <class T>
struct Mask {
  using P = Policy<T>;
  const Operands<T>& o;
  double out;                        // the score of a pair that is left out: -inf, or +inf for distances
  bool triangle;                     // keep column < row only
  const int64_t* partner = nullptr;  // leave out column partner[row]; in a triangle that pair, whichever row names it
  const int32_t *ids_x = nullptr, *ids_y = nullptr;

  void apply(const Block<T>& b) const {
    const T out = static_cast<T>(this->out);
    const int64_t n = o.x.n(), m = o.y.n();
    for (int64_t p = 0; p < b.panels; ++p) {
      T* s = b.panel(p);
      const int64_t row = b.row + p * P::NR;
      const int64_t lanes = n - row < P::NR ? n - row : P::NR;
      for (int v = static_cast<int>(lanes / kLanes<T>); v < P::kVectors; ++v) {
        const IVec<T> past = iota<T>() >= isplat<T>(static_cast<IntOf<T>>(lanes - v * kLanes<T>));
        for (T* place = s + v * kLanes<T>; place < s + b.columns * P::NR; place += P::NR)
          store(place, select(past, splat<T>(out), load(place)));
      }
      for (int64_t j = m - b.column < 0 ? 0 : m - b.column; j < b.columns; ++j)
        for (int64_t lane = 0; lane < P::NR; ++lane) s[j * P::NR + lane] = out;
      if (triangle && b.column + b.columns > row)
        for (int64_t j = row > b.column ? row - b.column : 0; j < b.columns; ++j)
          for (int64_t lane = 0; lane < P::NR && row + lane <= b.column + j; ++lane) s[j * P::NR + lane] = out;
      if (partner)
        for (int64_t lane = 0; lane < lanes; ++lane) {
          const int64_t j = partner[row + lane] - b.column;
          if (j >= 0 && j < b.columns) s[j * P::NR + lane] = out;
        }
      if (partner && triangle)
        for (int64_t j = 0; j < b.columns && b.column + j < m; ++j) {
          const int64_t lane = partner[b.column + j] - row;
          if (lane >= 0 && lane < lanes) s[j * P::NR + lane] = out;
        }
      if (ids_x) mask_ids(b, row, lanes, s);
    }
  }

  void mask_ids(const Block<T>& b, int64_t row, int64_t lanes, T* s) const {
    IntOf<T> own[P::NR];
    for (int64_t lane = 0; lane < P::NR; ++lane) own[lane] = lane < lanes ? ids_x[row + lane] : IntOf<T>(-1);
    for (int64_t j = 0; j < b.columns && b.column + j < o.y.n(); ++j) {
      const IVec<T> other = isplat<T>(static_cast<IntOf<T>>(ids_y[b.column + j]));
      for (int v = 0; v < P::kVectors; ++v) {
        IVec<T> mine;
        __builtin_memcpy(&mine, own + v * kLanes<T>, sizeof(mine));
        T* place = s + j * P::NR + v * kLanes<T>;
        store(place, select(mine == other, splat<T>(static_cast<T>(out)), load(place)));
      }
    }
  }
};

}  // namespace
}  // namespace nearfar
