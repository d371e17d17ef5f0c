// Lloyd: one iteration of k-means: the labels that select finds, and float64 sums of the rows of each centroid.
//
// Rows are cut in parts; a thread owns one column of one part and adds its rows one after the other, so nothing is
// added by two threads. Parts are merged in an order that the shape decides.
#include "cuda/ops.hpp"
#include "cuda/strip.hpp"

namespace nearfar {
namespace {

using cuda::LloydDevice;

/// A thread a row; a block's shares of the inertia and of the number of labels that change.
template <class T>
struct Assign {
  int64_t n;
  const T* nearest;
  const int64_t* index;
  const T* weights;  // null: 1
  int64_t* labels;
  T* distances;  // null: not wanted
  double *inertia, *changed;

  NEARFAR_DEVICE void operator()() const {
    const int64_t i = cuda::global_thread();
    double own = 0;
    bool changes = false;
    if (i < n) {
      const bool near = nearest[i] < infinity<T>();  // not NaN
      const T distance = near ? nearest[i] : not_a_number<T>();
      const int64_t label = near ? index[i] : -1;
      own = (weights ? static_cast<double>(weights[i]) : 1.0) * static_cast<double>(distance);
      changes = labels[i] != label;
      labels[i] = label;
      if (distances) distances[i] = distance;
    }
    const double part = block_sum(own), count = block_sum(changes ? 1 : 0);
    if (cuda::thread_index() > 0) return;
    inertia[cuda::block_index()] = part;
    changed[cuda::block_index()] = count;
  }
};

/// Sums of a part of the rows, out[part][centroid][column]: a thread a column. The last column is of weights alone.
template <class T>
struct SumRows {
  Source<T> x;
  const T* weights;
  const int64_t* labels;
  int64_t k, parts;
  double* out;

  NEARFAR_DEVICE void operator()() const {
    const int64_t n = x.rows.n, d = x.rows.d, columns = d + 1;
    const int64_t at = cuda::global_thread(), part = at / columns, column = at % columns;
    if (part >= parts) return;
    double* sums = out + part * k * columns + column;
    for (int64_t j = 0; j < k; ++j) sums[j * columns] = 0;
    const int64_t end = n * (part + 1) / parts;
    for (int64_t i = n * part / parts; i < end; ++i) {
      if (labels[i] < 0) continue;
      const double weight = weights ? static_cast<double>(weights[i]) : 1.0;
      sums[labels[i] * columns] += column < d ? weight * static_cast<double>(x.get(i, column)) : weight;
    }
  }
};

/// A warp a number of the result.
struct MergeSums {
  int64_t k, d, parts;
  const double* in;
  double *sums, *counts;
  NEARFAR_DEVICE void operator()() const {
    const int64_t columns = d + 1, at = cuda::global_warp(), j = at / columns, column = at % columns;
    if (j >= k) return;
    double sum = 0;
    for (int64_t part = cuda::lane_index(); part < parts; part += cuda::kWarp) sum += in[part * k * columns + at];
    sum = cuda::warp_sum(sum);
    if (cuda::lane_index() == 0) (column < d ? sums[j * d + column] : counts[j]) = sum;
  }
};

/// By the shape alone: memory is bounded, a part is worth the merge, and a sum over parts is short.
int64_t parts_of(int64_t n, int64_t k, int64_t d, int64_t bytes) {
  constexpr int64_t kRows = 64, kMost = 1024;
  int64_t parts = bytes / (k * (d + 1) * static_cast<int64_t>(sizeof(double)));
  if (parts > ceil_div(n, kRows)) parts = ceil_div(n, kRows);
  return parts < 1 ? 1 : parts > kMost ? kMost : parts;
}

}  // namespace

namespace cuda {

template <class T>
void lloyd(Context& c, const LloydDevice<T>& p) {
  const int64_t n = p.x.n, d = p.x.d, k = p.centroids.n, blocks = ceil_div(n, kThreads);
  SelectParams<T> nearest{};
  nearest.x = p.x;
  nearest.y = p.centroids;
  nearest.map = PairMap::sqeuclidean;
  nearest.normalize = p.normalize;
  nearest.k = 1;
  nearest.value = c.take<T>(n);
  nearest.index = c.take<int64_t>(n);
  if (n > 0) select(c, nearest);
  double *inertia = c.take<double>(blocks), *changed = c.take<double>(blocks);
  c.launch(blocks, Assign<T>{n, nearest.value, nearest.index, p.weights, p.labels, p.distances, inertia, changed});
  c.launch(1, StoreSum{{inertia, blocks}, p.inertia_at});
  c.launch(1, StoreSum{{changed, blocks}, p.changed_at});
  if (!p.sums) return;
  const Source<T> x = source_of<T>(c, p.x, p.normalize);
  const int64_t parts = parts_of(n, k, d, c.strip_bytes);
  double* partial = c.take<double>(parts * k * (d + 1));
  c.launch_threads(parts * (d + 1), SumRows<T>{x, p.weights, p.labels, k, parts, partial});
  c.launch_warps(k * (d + 1), MergeSums{k, d, parts, partial, p.sums, p.counts});
}

}  // namespace cuda
}  // namespace nearfar

NEARFAR_INSTANTIATE(lloyd, LloydDevice)
