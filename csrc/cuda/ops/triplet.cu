// Triplet losses of a labelled batch: what each mining means is said in cpu/ops/triplet.cpp.
//
// Squared distances go to a strip of whole rows. A block takes an anchor's row at a time: it lists and sorts the
// positives, finds for every negative its rank among them, and puts the weights of the gradient in place of the
// distances; the products of the strip do the rest. Triplets are enumerated for softplus over all of them only, and
// never kept. Minima and counts are integers where threads meet, sums have an order: results are bitwise the same.
#include "cuda/loss.hpp"
#include "cuda/row.hpp"
#include "pairwise/triplet.hpp"

namespace nearfar {
namespace {

using cuda::TripletDevice;

/// Rows as T, zero where one has NaN or inf: such a row is in no triplet.
template <class T>
struct CopyFinite {
  Source<T> source;
  T* out;
  uint8_t* present;
  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp(), d = source.rows.d;
    if (i >= source.rows.n) return;
    bool bad = false;
    for (int64_t k = cuda::lane_index(); k < d; k += cuda::kWarp) {
      const T value = source.raw(i, k);
      bad = bad || !(value - value == 0);
      out[i * d + k] = value;
    }
    bad = cuda::ballot(bad) != 0;
    for (int64_t k = cuda::lane_index(); bad && k < d; k += cuda::kWarp) out[i * d + k] = 0;
    if (cuda::lane_index() == 0) present[i] = !bad;
  }
};

template <class T>
struct StoreSquares {
  static constexpr bool kDistances = true;
  Scores<T> scores;
  int64_t n;
  Weights<T> strip;
  NEARFAR_DEVICE bool wants(int64_t, int64_t, int, int) const { return true; }
  template <class P>
  NEARFAR_DEVICE void apply(const Fragment<P>& f, int64_t, int64_t, int64_t) const {
    const uint64_t hidden = outside(f, strip.block, n, n);
    scores.apply(f, strip.block.row + f.i0, strip.block.column + f.j0, hidden);
    f.replace(hidden, T(0));
    strip.store(f);
  }
};

/// Of an anchor; `places` of each for every block at work.
template <class T>
struct Lists {
  T *key, *best;      // values of the positives, ascending; the nearest negative of every rank, or weights
  double* number;     // of every positive
  int32_t* column;    // of the positives, ascending
  int32_t* order;     // which of them has a key
  int32_t *who, *of;  // the column of `best`; counts of negatives by rank
  static constexpr int64_t kBytes = 2 * sizeof(T) + sizeof(double) + 4 * sizeof(int32_t);

  static Lists take(cuda::Context& c, int64_t count) {
    Lists all{};
    all.key = c.take<T>(count);
    all.best = c.take<T>(count);
    all.number = c.take<double>(count);
    all.column = c.take<int32_t>(count);
    all.order = c.take<int32_t>(count);
    all.who = c.take<int32_t>(count);
    all.of = c.take<int32_t>(count);
    return all;
  }
  NEARFAR_DEVICE Lists from(int64_t at) const {
    return {key + at, best + at, number + at, column + at, order + at, who + at, of + at};
  }
};

template <class T>
struct MineRows {
  Weights<T> strip;
  Scores<T> scores;
  Triplet<T> triplet;
  Mining mining;
  bool gradient;
  int64_t n;
  const int64_t* labels;
  const uint8_t* present;
  const T* upstream;        // null: 1
  double *sums, *counts;    // out: of every anchor
  int64_t *first, *second;  // out: mined positives and negatives; null: not wanted
  const int64_t* begin;
  Lists<T> lists;
  int64_t places;

  /// One anchor: its row of the strip and its lists.
  struct Anchor {
    int64_t i, label, positives;
    T* s;
    T up;
    Lists<T> list;
  };

  NEARFAR_DEVICE void operator()() const {
    for (int64_t local = cuda::block_index(); local < strip.block.rows; local += cuda::block_count()) {
      const int64_t i = strip.block.row + local;
      const bool here = i < n && present[i];
      Anchor a{i,
               here ? labels[i] : 0,
               0,
               strip.w + local * strip.pitch,
               here && upstream ? upstream[i] : T(1),
               lists.from(cuda::block_index() * places)};
      if (here && mining == Mining::all) to_values(a);
      double sum = 0, count = 0;  // a thread's part
      if (here) {
        a.positives = compact(
            mining == Mining::hard ? 0 : n, [&](int64_t j) { return there(a, j) && labels[j] == a.label; },
            [&](int64_t place, int64_t j) {
              a.list.key[place] = a.s[j];
              a.list.column[place] = static_cast<int32_t>(j);
              a.list.order[place] = static_cast<int32_t>(place);
            });
        if (mining == Mining::hard) {
          hard(a, sum, count);
        } else if (a.positives > 0) {
          sort_keys(a.list.key, a.list.order, a.positives);
          mining == Mining::semihard ? semihard(a, sum, count)
          : triplet.soft             ? all_soft(a, sum, count)
                                     : all_hinge(a, sum, count);
        }
      }
      sum = block_sum(sum);
      count = block_sum(count);
      if (cuda::thread_index() == 0 && i < n) sums[i] = here ? sum : not_a_number<double>(), counts[i] = count;
      if (!gradient) continue;
      if (!here || (a.positives == 0 && mining != Mining::hard)) replace(a, [](int64_t) { return T(0); });
      keep_near(a);
    }
  }

 private:
  NEARFAR_DEVICE bool there(const Anchor& a, int64_t j) const { return j != a.i && present[j] && a.s[j] == a.s[j]; }
  NEARFAR_DEVICE bool negative(const Anchor& a, int64_t j) const { return there(a, j) && labels[j] != a.label; }
  template <class F>
  NEARFAR_DEVICE static void each(int64_t count, F f) {
    for (int64_t k = cuda::thread_index(); k < count; k += cuda::kThreads) f(k);
  }
  template <class F>
  NEARFAR_DEVICE void each_negative(const Anchor& a, F f) const {
    each(n, [&](int64_t j) {
      if (negative(a, j)) f(j);
    });
  }
  NEARFAR_DEVICE T square_of(T s) const { return mining == Mining::all ? triplet.square(s) : s; }
  NEARFAR_DEVICE T weight(const Anchor& a, double slope, T value) const {
    return static_cast<T>(slope) * a.up * triplet.pull(value);
  }
  NEARFAR_DEVICE void to_values(const Anchor& a) const {
    each(n, [&](int64_t j) { a.s[j] = triplet.value(a.s[j]); });
    cuda::sync_block();
  }

  // ---- the row becomes weights

  /// s_j = f(j) for all columns; marks near pairs, as the distances have them.
  template <class F>
  NEARFAR_DEVICE void replace(const Anchor& a, F f) const {
    for (int64_t j = cuda::thread_index(); j < strip.block.columns; j += cuda::kThreads) {  // whole warps
      const bool near = a.i < n && j < n && scores.near(a.i, j, square_of(a.s[j]));
      const uint32_t bits = cuda::ballot(near);
      if (cuda::lane_index() == 0) *strip.word(a.i, j) = bits;
      a.s[j] = j < n ? f(j) : T(0);
    }
    cuda::sync_block();
  }
  /// Of near pairs those that have a weight.
  NEARFAR_DEVICE void keep_near(const Anchor& a) const {
    cuda::sync_block();
    for (int64_t j = cuda::thread_index(); j < strip.block.columns; j += cuda::kThreads) {
      const uint32_t bits = cuda::ballot(a.s[j] != 0);
      if (cuda::lane_index() == 0) *strip.word(a.i, j) &= bits;
    }
    cuda::sync_block();
  }

  // ---- the minings: a thread's part of the sum and the number of triplets

  NEARFAR_DEVICE void hard(const Anchor& a, double& sum, double& count) const {
    Best<T> far{0, -1}, near{0, -1};
    each(n, [&](int64_t j) {
      if (!there(a, j)) return;
      if (labels[j] == a.label) {
        far = far.least({-a.s[j], j});
      } else {
        near = near.least({a.s[j], j});
      }
    });
    far = block_least(far);
    near = block_least(near);
    const bool found = far.index >= 0 && near.index >= 0;
    const T v_far = triplet.value(-far.value), v_near = triplet.value(near.value);
    T slope = 0;
    if (found && cuda::thread_index() == 0) {
      sum = triplet.loss(v_far, v_near, slope);
      count = 1;
      if (first) first[a.i] = far.index, second[a.i] = near.index;
    }
    if (!gradient) return;
    replace(a, [](int64_t) { return T(0); });
    if (!found || cuda::thread_index() != 0) return;
    a.s[far.index] = weight(a, static_cast<double>(slope), v_far);
    a.s[near.index] = weight(a, -static_cast<double>(slope), v_near);
  }

  NEARFAR_DEVICE void semihard(const Anchor& a, double& sum, double& count) const {
    const Lists<T>& l = a.list;
    const int64_t positives = a.positives;
    constexpr int32_t kNobody = INT32_MAX;
    // Of every rank the nearest negative, ties to the lower column; then of every rank and those above it.
    each(positives + 1, [&](int64_t k) { l.best[k] = infinity<T>(), l.who[k] = kNobody; });
    cuda::sync_block();
    each_negative(a,
                  [&](int64_t j) { cuda::atomic_min(l.best + rank_among<false>(l.key, positives, a.s[j]), a.s[j]); });
    cuda::sync_block();
    each_negative(a, [&](int64_t j) {
      const int64_t rank = rank_among<false>(l.key, positives, a.s[j]);
      if (a.s[j] == l.best[rank]) cuda::atomic_min(l.who + rank, static_cast<int32_t>(j));
    });
    auto nearest = [&](int64_t k) { return Best<T>{l.best[k], l.who[k] == kNobody ? -1 : l.who[k]}; };
    scan(
        positives + 1, Best<T>{0, -1}, [&](int64_t k) { return nearest(positives - k); },
        [](const Best<T>& x, const Best<T>& y) { return x.least(y); },
        [&](int64_t k, const Best<T>& best) {
          l.best[positives - k] = best.value;
          l.who[positives - k] = best.index < 0 ? kNobody : static_cast<int32_t>(best.index);
        });
    int64_t farthest = -1;
    if (l.who[positives] == kNobody) {  // the same for all threads
      Best<T> far{0, -1};
      each_negative(a, [&](int64_t j) { far = far.least({-a.s[j], j}); });
      farthest = block_least(far).index;
    }
    auto negative_of = [&](int64_t k) { return l.who[k + 1] == kNobody ? farthest : l.who[k + 1]; };
    if (farthest < 0 && l.who[positives] == kNobody) {  // no negative at all
      if (gradient) replace(a, [](int64_t) { return T(0); });
      return;
    }
    each(positives, [&](int64_t k) {
      const int64_t j = negative_of(k), place = l.order[k];
      T slope;
      sum += triplet.loss(triplet.value(l.key[k]), triplet.value(a.s[j]), slope);
      count += 1;
      l.number[k] = static_cast<double>(slope);
      if (first) first[begin[a.i] + place] = l.column[place], second[begin[a.i] + place] = j;
    });
    if (!gradient) return;
    cuda::sync_block();
    // Positives that share a negative are neighbours; the last of them sums the negative's weight.
    auto is_last = [&](int64_t k) { return k == positives - 1 || negative_of(k + 1) != negative_of(k); };
    each(positives, [&](int64_t k) {
      if (!is_last(k)) return;
      const int64_t j = negative_of(k);
      double slopes = 0;
      for (int64_t other = k; other >= 0 && negative_of(other) == j; --other) slopes += l.number[other];
      l.best[k] = weight(a, -slopes, triplet.value(a.s[j]));
    });
    cuda::sync_block();
    replace(a, [](int64_t) { return T(0); });
    each(positives, [&](int64_t k) {
      a.s[l.column[l.order[k]]] = weight(a, l.number[k], triplet.value(l.key[k]));
      if (is_last(k)) a.s[negative_of(k)] = l.best[k];
    });
  }

  NEARFAR_DEVICE void all_hinge(const Anchor& a, double& sum, double& count) const {
    const Lists<T>& l = a.list;
    const int64_t positives = a.positives;
    // A negative nearer than best[k] = key[k] + margin has a positive loss with positive k.
    each(positives, [&](int64_t k) { l.best[k] = l.key[k] + triplet.margin, l.of[k] = 0; });
    cuda::sync_block();
    // Sums are of (last - v): all terms are positive, and small where the loss is.
    const double last = static_cast<double>(l.best[positives - 1]);
    auto add = [](double x, double y) { return x + y; };
    scan(
        positives, 0.0, [&](int64_t k) { return last - static_cast<double>(l.best[positives - 1 - k]); }, add,
        [&](int64_t k, double slack) { l.number[positives - 1 - k] = slack; });
    each_negative(a, [&](int64_t j) {
      const int64_t rank = rank_among<true>(l.best, positives, a.s[j]);
      if (rank == positives) return;
      const double active = static_cast<double>(positives - rank);
      sum += active * (last - static_cast<double>(a.s[j])) - l.number[rank];
      count += active;
      if (gradient) cuda::atomic_add(l.of + rank, 1);
    });
    if (!gradient) return;
    cuda::sync_block();
    scan(
        positives, 0.0, [&](int64_t k) { return static_cast<double>(l.of[k]); }, add,
        [&](int64_t k, double active) { l.number[k] = active; });
    replace(a, [&](int64_t j) {
      if (!negative(a, j)) return T(0);
      const int64_t rank = rank_among<true>(l.best, positives, a.s[j]);
      return weight(a, -static_cast<double>(positives - rank), a.s[j]);
    });
    put_positives(a);
  }

  NEARFAR_DEVICE void all_soft(const Anchor& a, double& sum, double& count) const {
    const Lists<T>& l = a.list;
    cuda::sync_block();
    // Positives' slopes, a warp each; the loss with them.
    for (int64_t k = cuda::warp_index(); k < a.positives; k += cuda::kWarps) {
      double slopes = 0;
      for (int64_t j = cuda::lane_index(); j < n; j += cuda::kWarp) {
        if (!negative(a, j)) continue;
        T loss, slope;
        softplus(l.key[k] - a.s[j], loss, slope);
        sum += static_cast<double>(loss);
        slopes += static_cast<double>(slope);
        count += 1;
      }
      slopes = cuda::warp_sum(slopes);
      if (cuda::lane_index() == 0) l.number[k] = slopes;
    }
    if (!gradient) return;
    cuda::sync_block();
    replace(a, [&](int64_t j) {
      if (!negative(a, j)) return T(0);
      double slopes = 0;
      for (int64_t k = 0; k < a.positives; ++k) {
        T loss, slope;
        softplus(l.key[k] - a.s[j], loss, slope);
        slopes += static_cast<double>(slope);
      }
      return weight(a, -slopes, a.s[j]);
    });
    put_positives(a);
  }
  NEARFAR_DEVICE static void softplus(T gap, T& loss, T& slope) {
    const T e = exp_flush(-absolute(gap)), share = 1 / (1 + e);
    loss = largest(gap, T(0)) + log1p(e);
    slope = gap > 0 ? share : e * share;
  }
  /// The slopes in `number` to the places of the positives.
  NEARFAR_DEVICE void put_positives(const Anchor& a) const {
    each(a.positives,
         [&](int64_t k) { a.s[a.list.column[a.list.order[k]]] = weight(a, a.list.number[k], a.list.key[k]); });
  }
};

/// The value, the number of triplets, and what the gradient is to be multiplied by.
struct Totals {
  OrderedSum sums, counts;
  bool mean;
  double *total, *count, *scale;
  NEARFAR_DEVICE void operator()() const {
    const double sum = sums();
    cuda::sync_block();
    const double triplets = counts();
    if (cuda::thread_index() != 0) return;
    const double over = mean && triplets > 0 ? triplets : 1;
    *total = sum / over;
    *count = triplets;
    *scale = 1 / over;
  }
};

/// Anchors' sums as T, and the gradient of rows that are in no triplet because they are not numbers.
template <class T>
struct StoreAnchors {
  int64_t n, d;
  const uint8_t* present;
  const double* sums;
  T *value, *dx;
  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_warp();
    if (i >= n) return;
    if (cuda::lane_index() == 0) value[i] = static_cast<T>(sums[i]);
    for (int64_t k = cuda::lane_index(); dx && !present[i] && k < d; k += cuda::kWarp)
      dx[i * d + k] = not_a_number<T>();
  }
};

}  // namespace

namespace cuda {

template <class T>
void triplet(Context& c, const TripletDevice<T>& p) {
  const int64_t n = p.x.n, d = p.x.d;
  T* finite = c.take<T>(n * d);
  uint8_t* present = c.take<uint8_t>(n);
  c.launch_warps(n, CopyFinite<T>{{p.x}, finite, present});
  const Rows rows{finite, n, d, d, 1, sizeof(T) == 8 ? DType::f64 : DType::f32};
  const Pairs<T, T> pairs(c, rows, rows, p.normalize, true, p.dx != nullptr);
  Strip<T, T> strip(c, pairs, true, true, p.dx, p.dx);
  double *sums = c.take<double>(n), *counts = c.take<double>(n), *scale = c.take<double>(1);
  // Enough blocks to fill the device, but no more than lists for them are worth.
  const int64_t places = p.mining == Mining::hard ? 1 : n + 1,
                affordable = c.strip_bytes / 2 / (places * Lists<T>::kBytes);
  int64_t blocks = 4 * c.device.multiprocessors;
  if (blocks > affordable) blocks = affordable < 1 ? 1 : affordable;
  const Lists<T> lists = Lists<T>::take(c, blocks * places);
  strip.for_blocks([&](const Weights<T>& weights) {
    const Block& b = weights.block;
    launch_scores(c, plan_scores(c, "distances of triplets", pairs, b), pairs, b,
                  StoreSquares<T>{pairs.scores, n, weights});
    c.launch(blocks < b.rows ? blocks : b.rows, MineRows<T>{weights,
                                                            pairs.scores,
                                                            {p.squared, p.soft, static_cast<T>(p.margin)},
                                                            p.mining,
                                                            p.dx != nullptr,
                                                            n,
                                                            p.labels,
                                                            present,
                                                            p.weights,
                                                            sums,
                                                            counts,
                                                            p.positive,
                                                            p.negative,
                                                            p.begin,
                                                            lists,
                                                            places});
    if (p.dx) strip.products(weights);
  });
  c.launch(1, Totals{{sums, n}, {counts, n}, p.mean, p.total, p.count_at, scale});
  if (p.dx) finish_rows(c, pairs.scores.x, p.dx, FinishRows<T>{{}, nullptr, {}, scale, 1, nullptr});
  c.launch_warps(n, StoreAnchors<T>{n, d, present, sums, p.value, p.dx});
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(triplet, TripletDevice)
