// Reduce: mergeable states with a neutral element. The third word of the vocabulary.
//
// The same merge joins tiles, threads, thread blocks and machines. Merging is done in an order that the shape decides.
#pragma once

#include <cmath>
#include <limits>

#include "pairwise/function.hpp"

namespace nearfar {
namespace {

/// log sum exp as (m, s): sum = s * exp(m). Neutral element (-inf, 0). A NaN term makes s, and so the value, NaN.
struct LogSumExp {
  double m = -std::numeric_limits<double>::infinity();
  double s = 0;

  NEARFAR_FN void add(double other_m, double other_s) {
    if (std::isnan(other_m)) other_s = other_m;
    if (other_s == 0) return;
    if (!(other_m <= m)) {
      s = s * (m == other_m ? 1.0 : std::exp(m - other_m)) + other_s;
      m = other_m;
    } else {
      s += other_s * (m == other_m ? 1.0 : std::exp(other_m - m));
    }
  }
  NEARFAR_FN void merge(const LogSumExp& other) { add(other.m, other.s); }
  NEARFAR_FN double value() const { return s == 0 ? -std::numeric_limits<double>::infinity() : m + std::log(s); }
};

}  // namespace
}  // namespace nearfar
