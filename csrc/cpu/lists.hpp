// The k best columns of each lane while columns go by: unsorted lists, where a better column takes the place of the
// worst, so that a new one moves nothing. They are sorted once, in the end.
#pragma once

#include "cpu/mask.hpp"
#include "cpu/tile.hpp"

namespace nearfar {
namespace {

/// The lists of a panel of rows.
template <class T>
struct Lists {
  int64_t k, room;  // room: padded(k)
  T* worst;         // per lane: what a column must beat
  IntOf<T>* last;   // the index of the worst of k, which gives way to an equal one of a lower index; -1 while fewer
  int64_t* count;   // how many are kept, and the place of the worst of k
  int64_t* place;
  T* kept;  // [lane][room], -infinity from the k-th on
  int64_t* index;

  /// Lists of some rows with nothing in them.
  static void clear(T* kept, int64_t* index, int64_t rows, int64_t room) {
    for (int64_t at = 0; at < rows * room; ++at) kept[at] = static_cast<T>(-kInfinity), index[at] = -1;
  }
  /// Bars and counts of the first lanes; those from `rows` on have no row and look for nothing.
  void open(int64_t lanes, int64_t rows) const {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      worst[lane] = static_cast<T>(lane < rows ? kInfinity : -kInfinity);
      last[lane] = -1;
      count[lane] = 0;
    }
  }

  Lists from(int64_t lane) const {
    return {k, room, worst + lane, last + lane, count + lane, place + lane, kept + lane * room, index + lane * room};
  }

  /// The lanes of a vector where a column of these keys is better than the worst of k: of equal ones, the first.
  NEARFAR_INLINE IVec<T> better(Vec<T> keys, int64_t j, int v) const {
    const Vec<T> bar = load(worst + v * kLanes<T>);
    IVec<T> own;
    __builtin_memcpy(&own, last + v * kLanes<T>, sizeof own);
    return (keys < bar) | ((keys == bar) & (isplat<T>(static_cast<IntOf<T>>(j)) < own));
  }

  /// Adds a column to a lane's list, in place of the worst of k.
  void keep(T key, int64_t j, int64_t lane) const {
    T* own = kept + lane * room;
    int64_t* columns = index + lane * room;
    int64_t& at = place[lane];
    if (count[lane] < k) at = count[lane]++;
    own[at] = key;
    columns[at] = j;
    if (count[lane] < k) return;
    Vec<T> most = load(own);
    for (int64_t c = kLanes<T>; c < room; c += kLanes<T>) most = vmax(load(own + c), most);
    worst[lane] = hmax<T>(most);
    const Vec<T> least_wanted = splat<T>(worst[lane]);
    int64_t highest = -1;
    for (int64_t c = 0; c < room; c += 64)
      for (uint64_t equal = lanes_that(own + c, room - c, [&](Vec<T> v) { return v == least_wanted; }); equal;
           equal &= equal - 1) {
        const int64_t next = c + __builtin_ctzll(equal);
        if (columns[next] > highest) highest = columns[next], at = next;
      }
    last[lane] = static_cast<IntOf<T>>(highest);
  }

  /// The columns of one list by their keys, equal ones in any order; how many.
  static int64_t sort(int64_t k, int64_t room, const T* own, const int64_t* index, int64_t* order) {
    int64_t count = 0;
    while (count < k && index[count] >= 0) order[count++] = -1;
    for (int64_t c = 0; c < count; ++c) {
      int64_t rank = own[c] > -kInfinity ? count - room : 0;  // what is no column is -infinity too
      for (int64_t u = 0; u < room; u += 64)
        rank += __builtin_popcountll(lanes_that(own + u, room - u, [&](Vec<T> v) { return v < splat<T>(own[c]); }));
      while (order[rank] >= 0) ++rank;
      order[rank] = index[c];
    }
    return count;
  }

 private:
  /// The first 64 of some values, whole vectors of them, of which something is true.
  template <class F>
  NEARFAR_INLINE static uint64_t lanes_that(const T* values, int64_t count, F is) {
    uint64_t lanes = 0;
    for (int64_t c = 0; c < count && c < 64; c += kLanes<T>)
      lanes |= static_cast<uint64_t>(lanes_set(is(load(values + c)))) << c;
    return lanes;
  }
};

}  // namespace
}  // namespace nearfar
