// What the threads of a block do together on the numbers of one row, in global memory: compact, sort, search, scan,
// find the best. All threads of the block call, and what they see does not depend on their order.
#pragma once

#include "cuda/number.hpp"

namespace nearfar {
inline namespace device {

/// A number and its column; -1: none.
template <class T>
struct Best {
  T value;
  int64_t index;
  /// The smaller value, ties to the lower index.
  NEARFAR_DEVICE Best least(const Best& other) const {
    if (other.index < 0) return *this;
    if (index < 0 || other.value < value || (other.value == value && other.index < index)) return other;
    return *this;
  }
};

/// The least of one of every thread; all have it.
template <class T>
NEARFAR_DEVICE Best<T> block_least(Best<T> own) {
  NEARFAR_SHARED T values[cuda::kWarps];
  NEARFAR_SHARED int64_t indices[cuda::kWarps];
  for (int mask = cuda::kWarp / 2; mask > 0; mask /= 2)
    own = own.least({cuda::shuffle_xor(own.value, mask), cuda::shuffle_xor(own.index, mask)});
  if (cuda::lane_index() == 0) values[cuda::warp_index()] = own.value, indices[cuda::warp_index()] = own.index;
  cuda::sync_block();
  for (int w = 0; w < cuda::kWarps; ++w) own = own.least({values[w], indices[w]});
  cuda::sync_block();
  return own;
}

/// put(place, j) for the j in [0, count) for which is(j) holds, ascending; how many there are.
template <class Is, class Put>
NEARFAR_DEVICE int64_t compact(int64_t count, Is is, Put put) {
  NEARFAR_SHARED int of_warp[cuda::kWarps];
  const int lane = cuda::lane_index(), warp = cuda::warp_index();
  int64_t found = 0;
  for (int64_t j0 = 0; j0 < count; j0 += cuda::kThreads) {
    const int64_t j = j0 + cuda::thread_index();
    const bool here = j < count && is(j);
    const uint32_t bits = cuda::ballot(here);
    if (lane == 0) of_warp[warp] = cuda::count_bits(bits);
    cuda::sync_block();
    int64_t place = found + cuda::count_bits(bits & ((1u << lane) - 1));
    for (int w = 0; w < cuda::kWarps; ++w) {
      if (w < warp) place += of_warp[w];
      found += of_warp[w];
    }
    if (here) put(place, j);
    cuda::sync_block();
  }
  return found;
}

/// Ascending by key, `payload` goes along. Bitonic, all comparisons in one direction, so that places past the end,
/// which count as largest, are never touched.
template <class T>
NEARFAR_DEVICE void sort_keys(T* key, int32_t* payload, int64_t count) {
  cuda::sync_block();
  for (int64_t half = 1; half < count; half *= 2)
    for (int64_t step = half; step > 0; step /= 2) {
      for (int64_t k = cuda::thread_index();; k += cuda::kThreads) {
        const int64_t within = k & (step - 1), begin = 2 * (k - within), low = begin + within;
        if (low >= count) break;
        const int64_t high = step == half ? begin + 2 * step - 1 - within : low + step;
        if (high >= count || !(key[high] < key[low])) continue;
        const T larger = key[low];
        const int32_t of_larger = payload[low];
        key[low] = key[high];
        payload[low] = payload[high];
        key[high] = larger;
        payload[high] = of_larger;
      }
      cuda::sync_block();
    }
}

/// How many of the ascending keys are less than a value, or with OR_EQUAL not more. By one thread.
template <bool OR_EQUAL, class T>
NEARFAR_DEVICE int64_t rank_among(const T* key, int64_t count, T value) {
  int64_t low = 0;
  while (count > 0) {
    const int64_t half = count / 2;
    const bool below = OR_EQUAL ? key[low + half] <= value : key[low + half] < value;
    if (below) low += half + 1;
    count = below ? count - half - 1 : half;
  }
  return low;
}

/// put(k, get(0) + ... + get(k)) for all k, where `add(a, b)` says what + is: every thread sums a stretch, in order.
template <class State, class Get, class Add, class Put>
NEARFAR_DEVICE void scan(int64_t count, State neutral, Get get, Add add, Put put) {
  NEARFAR_SHARED State stretches[cuda::kThreads];
  const int thread = cuda::thread_index();
  const int64_t length = (count + cuda::kThreads - 1) / cuda::kThreads;
  const int64_t begin = thread * length, end = begin + length < count ? begin + length : count;
  cuda::sync_block();
  State sum = neutral;
  for (int64_t k = begin; k < end; ++k) sum = add(sum, get(k));
  stretches[thread] = sum;
  cuda::sync_block();
  sum = neutral;
  for (int t = 0; t < thread && begin < end; ++t) sum = add(sum, stretches[t]);
  for (int64_t k = begin; k < end; ++k) {
    sum = add(sum, get(k));
    put(k, sum);
  }
  cuda::sync_block();
}

}  // namespace device
}  // namespace nearfar
