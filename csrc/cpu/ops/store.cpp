// Store: the whole matrix of a map or of a kernel's program, and the gradient through it. Here, and only here, the
// matrix exists: it is the result.
//
// The second index runs along the lanes, so that rows of the result are written in order; the first, where there are
// too few columns to fill them. The fewest meet the others' rows where these lie (few.hpp). Where y is x, tiles on and
// above the diagonal are computed and mirrored.
#include <type_traits>
#include <utility>

#include "cpu/coordinate.hpp"
#include "cpu/few.hpp"
#include "cpu/mask.hpp"
#include "cpu/store_gradient.hpp"
#include "cpu/store_together.hpp"

namespace nearfar {
namespace {

/// Blocks of a map's values: rows of the result are tiles, its columns are lanes.
template <class T, class Map>
struct MapTiles {
  using P = Policy<T>;

  static constexpr bool kByCoordinate = std::is_base_of_v<CoordinateMap, Map>;

  MapTiles(const StoreParams<T>& p, const Map& own)
      : map(own),
        few_(!kByCoordinate && !p.same && fewest<T>(p.x.n, p.y.n, p.x.d) && p.x.d >= kLanes<T>),
        o(p.y, p.x, p.normalize && !few_, Map::kDistance && !few_, false, p.threads, ScoreKind::dot, !few_),
        same(p.same) {
    if (!few_) return;
    if (p.normalize) o.x.normalize_as_read(), o.y.normalize(p.threads);
    rows_ = Buffer<T>(P::NR * padded<T>(o.d));
    read_rows<P::NR>(o.y, 0, rows_.get());
  }

  const Chunks& chunks() const { return o.chunks; }
  int64_t packed() const { return P::NR * padded<T>(o.d); }
  int64_t squares() const { return P::NR; }
  int64_t row_buffer() const { return o.row_buffer(); }
  void pack(int64_t j0, T* rows, T* panel, T* squares) const {
    if (!few_ && !o.x.template gather<P::NR>(j0, panel)) o.pack_panel(j0, T(1), rows, panel, squares);
  }

  void block(int64_t t0, int64_t t1, int64_t j0, T* panel, const T* squares, T* out) const {
    if constexpr (kByCoordinate) {
      score_block(o.d, t1 - t0, o.tile(t0), o.tile_stride, panel, out, map.score);
    } else if (few_) {
      few_rows(j0, panel, out);
    } else {
      o.block(t0, t1, j0, panel, squares, out);
    }
    const int64_t rows = o.y.n() - t0 * P::MR, tiles = (t1 - t0) * P::MR;
    const int64_t values = (rows < tiles ? rows : tiles) * P::NR;
    for (int64_t k = 0; k < values; k += kLanes<T>) store(out + k, map.value(load(out + k)));
    if (!std::is_same_v<Map, OneMinusDotMap>) return;
    for (int64_t i = t0 * P::MR; i < t1 * P::MR && i < o.y.n(); ++i)
      mend_cosine(i, j0, o.x.n() - j0 < P::NR ? o.x.n() - j0 : P::NR, out + (i - t0 * P::MR) * P::NR);
  }

  /// Few rows of the result: columns are read where they lie. Distances come from differences, so none is mended.
  void few_rows(int64_t j0, T* copies, T* out) const {
    using Score = std::conditional_t<Map::kDistance, SquaredDifference, Dot>;
    const T* rows[P::NR];
    whole_rows(o.x, j0, j0 + P::NR, rows, copies);
    const int64_t stride = padded<T>(o.d);
    for (int64_t i = 0; i < o.y.n(); ++i)
      for (int lane = 0; lane < P::NR; lane += kLanes<T>)
        store(out + i * P::NR + lane, row_scores<Score>(stride, rows_.get() + i * stride, rows + lane));
  }

  /// 1 - <u, v> loses what it measures when u is near v; half the squared difference of the unit rows does not.
  void mend_cosine(int64_t i, int64_t j0, int64_t lanes, T* s) const {
    // A zero row is at distance 1 from every row but itself.
    if (same && i >= j0 && i < j0 + lanes && s[i - j0] == T(1)) s[i - j0] = 0;
    const Vec<T> limit = splat<T>(Operands<T>::kNear);
    IVec<T> near = IVec<T>{};
    for (int v = 0; v < P::kVectors; ++v) near |= load(s + v * kLanes<T>) <= limit;
    if (!any(near)) return;
    Buffer<T> rows(2 * o.d);
    for (int64_t lane = 0; lane < lanes; ++lane)
      if (s[lane] <= Operands<T>::kNear) s[lane] = o.direct_distance(j0 + lane, i, rows.get()) / 2;
  }

  const Map map;
  const bool few_;
  Operands<T> o;
  const bool same;
  Buffer<T> rows_;
};

/// The same of a program.
template <class T>
struct ProgramTiles {
  using P = Policy<T>;

  explicit ProgramTiles(const GramParams<T>& p)
      : scores(*p.program, p.y, p.x, p.same, false, p.threads), evaluator(*p.program) {}

  const Chunks& chunks() const { return scores.chunks(); }
  int64_t packed() const { return scores.packed(); }
  int64_t squares() const { return scores.squares(); }
  int64_t row_buffer() const { return scores.row_buffer(); }
  void pack(int64_t j0, T* rows, T* panel, T* squares) const { scores.pack(j0, rows, panel, squares); }

  void block(int64_t t0, int64_t t1, int64_t j0, T* panel, const T* squares, T* out) const {
    const int64_t size = (t1 - t0) * P::MR * P::NR;
    Buffer<T> others((scores.count - 1) * size);
    T* tiles[Program::kScores] = {out};
    for (int s = 1; s < scores.count; ++s) tiles[s] = others.get() + (s - 1) * size;
    scores.block(t0, t1, j0, panel, squares, tiles);
    evaluator.forward(tiles, size, out);
  }

  const Scores<T> scores;
  const Evaluator<T> evaluator;
};

/// Where the result lies; turned: its rows are columns there.
template <class T>
struct Matrix {
  int64_t n, m;
  bool same, condensed, turned;
  T* out;
  int threads;
};

/// Whether x and y change places: the columns would leave lanes empty.
template <class T, class Params>
bool turns(const Params& p) {
  return !p.same && p.y.n < Policy<T>::NR && p.y.n < p.x.n;
}
template <class Params>
Params turned(Params p) {
  std::swap(p.x, p.y);
  return p;
}
/// The same of a gradient. A single column lies in memory as a row does.
template <class Params>
Params turned_gradient(Params p) {
  std::swap(p.x, p.y);
  std::swap(p.dx, p.dy);
  return p;
}

template <class T, class Tiles>
class Store {
  using P = Policy<T>;
  static constexpr int NR = P::NR;

 public:
  Store(const Matrix<T>& matrix, const Tiles& tiles) : p(matrix), n(p.n), m(p.m), o(tiles) {}

  void run() {
    const int64_t panels = ceil_div(m, NR), packed = o.packed(), squares = o.squares();
    const int64_t all_tiles = o.chunks().tiles;
    // A large result passes the caches by, where its rows keep the alignment of a vector.
    constexpr int64_t kLarge = int64_t(8) << 20;
    stream_ = !p.condensed && !p.turned && n * m * static_cast<int64_t>(sizeof(T)) >= kLarge && m % kLanes<T> == 0 &&
              reinterpret_cast<uintptr_t>(p.out) % kVectorBytes == 0;
    if (all_tiles <= kTiles) return run_few(panels);
    panels_ = Buffer<T>(panels * packed);
    squares_ = Buffer<T>(panels * squares);
    parallel_for(panels, p.threads, [&](int64_t panel, int) {
      Buffer<T> rows(o.row_buffer());
      o.pack(panel * NR, rows.get(), panels_.get() + panel * packed, squares_.get() + panel * squares);
    });
    parallel_for(ceil_div(all_tiles, kTiles), p.threads, [&](int64_t task, int) {
      const int64_t t0 = task * kTiles, t1 = t0 + kTiles < all_tiles ? t0 + kTiles : all_tiles;
      for (int64_t panel = p.same ? t0 * P::MR / NR : 0; panel < panels; ++panel)
        compute(t0, t1, panel * NR, panels_.get() + panel * packed, squares_.get() + panel * squares);
      if (stream_) fence();
    });
  }

 private:
  // A task is a run of rows of the result: short enough to balance, long enough to reuse a panel.
  static constexpr int64_t kTiles = 48 / P::MR;

  /// One such run: every panel is needed once, as soon as it is packed, and nothing of y is kept.
  void run_few(int64_t panels) const {
    constexpr int64_t kEach = 1024 / NR;
    parallel_for(ceil_div(panels, kEach), p.threads, [&](int64_t task, int) {
      Buffer<T> rows(o.row_buffer()), packed(o.packed()), squares(o.squares());
      for (int64_t panel = task * kEach; panel < (task + 1) * kEach && panel < panels; ++panel) {
        o.pack(panel * NR, rows.get(), packed.get(), squares.get());
        compute(0, o.chunks().tiles, panel * NR, packed.get(), squares.get());
      }
      if (stream_) fence();
    });
  }

  void compute(int64_t t0, int64_t t1, int64_t j0, T* packed, const T* squares) const {
    alignas(64) T block[48 * NR];
    o.block(t0, t1, j0, packed, squares, block);
    write(t0 * P::MR, t1 * P::MR < n ? t1 * P::MR : n, j0, block);
  }

  void write(int64_t row0, int64_t row1, int64_t j0, const T* block) const {
    const int64_t lanes = m - j0 < NR ? m - j0 : NR;
    if (p.turned) {
      for (int64_t lane = 0; lane < lanes; ++lane)
        for (int64_t i = row0; i < row1; ++i) p.out[(j0 + lane) * n + i] = block[(i - row0) * NR + lane];
      return;
    }
    for (int64_t i = row0; i < row1; ++i) {
      const T* s = block + (i - row0) * NR;
      T* out = row_of(p.out, i, m, p.condensed) + j0;
      const int64_t begin = p.same && i >= j0 ? i - j0 + (p.condensed ? 1 : 0) : 0;
      if (begin == 0 && lanes == NR) {
        for (int v = 0; v < P::kVectors; ++v) put(out + v * kLanes<T>, load(s + v * kLanes<T>));
      } else {
        for (int64_t lane = begin; lane < lanes; ++lane) out[lane] = s[lane];
      }
    }
    if (p.same && !p.condensed) mirror(row0, row1, j0, lanes, block);
  }

  void put(T* to, Vec<T> v) const {
    if (stream_) {
      stream(to, v);
    } else {
      store(to, v);
    }
  }

  /// The block's transpose, to below the diagonal.
  void mirror(int64_t row0, int64_t row1, int64_t j0, int64_t lanes, const T* block) const {
    constexpr int L = kLanes<T>;
    for (int64_t i = row0; i < row1; i += L)
      for (int64_t lane = 0; lane < lanes; lane += L) {
        if (i + L <= row1 && lane + L <= lanes && i + L <= j0 + lane) {
          Vec<T> v[L];
#pragma GCC unroll 16
          for (int u = 0; u < L; ++u) v[u] = load(block + (i - row0 + u) * NR + lane);
          transpose<T>(v);
#pragma GCC unroll 16
          for (int u = 0; u < L; ++u) put(p.out + (j0 + lane + u) * m + i, v[u]);
          continue;
        }
        for (int64_t u = lane; u < lanes && u < lane + L; ++u)
          for (int64_t k = i; k < i + L && k < row1 && k < j0 + u; ++k)
            p.out[(j0 + u) * m + k] = block[(k - row0) * NR + u];
      }
  }

  const Matrix<T> p;
  const int64_t n, m;
  const Tiles& o;
  bool stream_ = false;
  Buffer<T> panels_, squares_;
};

template <class F>
void with_any_map(PairMap map, double power, F f) {
  by_coordinate(map) ? with_coordinate_map(map, power, f) : with_map(map, f);
}

template <class T>
void store_all(const StoreParams<T>& given) {
  const bool turn = turns<T>(given);
  const StoreParams<T> p = turn ? turned(given) : given;
  const auto run = [&](auto map) {
    const MapTiles<T, decltype(map)> tiles(p, map);
    Store<T, MapTiles<T, decltype(map)>>({p.x.n, p.y.n, p.same, p.condensed, turn, p.out, p.threads}, tiles).run();
  };
  with_any_map(p.map, p.power, run);
}

template <class T>
void gram_all(const GramParams<T>& given) {
  const bool turn = turns<T>(given);
  const GramParams<T> p = turn ? turned(given) : given;
  const ProgramTiles<T> tiles(p);
  Store<T, ProgramTiles<T>>({p.x.n, p.y.n, p.same, false, turn, p.out, p.threads}, tiles).run();
}

template <class T>
void gram_gradient(const GramGradParams<T>& p) {
  using P = Policy<T>;
  const int64_t n = p.x.n, m = p.y.n;
  if (m == 1 && n > 1) return gram_gradient(turned_gradient(p));
  // As in the result, its columns are lanes.
  auto upstream = [&](const Block<T>& b, int64_t panel, int64_t columns, T* out) {
    const int64_t j0 = b.row + panel * P::NR, lanes = m - j0 < P::NR ? m - j0 : P::NR;
    if (p.same) return both_ways(p.grad, n, b.column, columns, j0, out);
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t i = b.column + c;
      const T* grad = p.grad + i * m + j0;
      T* to = out + c * P::NR;
      if (i < n && lanes == P::NR) {
        if (i + kAhead < n && c + kAhead < columns) fetch(grad + kAhead * m, P::NR);
        for (int v = 0; v < P::kVectors; ++v) store(to + v * kLanes<T>, load(grad + v * kLanes<T>));
        continue;
      }
      for (int64_t lane = 0; lane < P::NR; ++lane) to[lane] = i < n && lane < lanes ? grad[lane] : T(0);
    }
  };
  program_gradient(*p.program, p.y, p.x, p.same, upstream, p.dy, p.dx, p.dparameters, p.threads);
}

/// Of the first set, or of the second where `second`; of both at once where y is x.
template <class T, class Map>
void coordinate_gradient(const StoreGradParams<T>& p, const Map& map, bool second) {
  const int64_t m = p.y.n;
  const auto place = [&](int64_t a, int64_t b) {
    const bool turned = second || (p.condensed && a > b);
    return row_of(static_cast<const T*>(p.grad), turned ? b : a, m, p.condensed) + (turned ? a : b) - p.grad;
  };
  const bool condensed = p.condensed, both = p.same && !condensed;
  CoordinateGradient<T, Map>{second ? p.y : p.x, second ? p.x : p.y, map, p.threads}.run(
      [&](int64_t a, int64_t b, T& grad, T& value) {
        const bool none = condensed && a == b;
        const int64_t at = none ? 0 : place(a, b);
        grad = none ? T(0) : both ? p.grad[at] + p.grad[place(b, a)] : p.grad[at];
        value = none ? T(0) : p.out[at];
      },
      second ? p.dy : p.dx);
}

template <class T>
void gradient_all(const StoreGradParams<T>& p) {
  if (p.y.n == 1 && p.x.n > 1 && !p.condensed) return gradient_all(turned_gradient(p));
  if (by_coordinate(p.map))
    return with_coordinate_map(p.map, p.power, [&](auto map) {
      if (p.dx) coordinate_gradient(p, map, false);
      if (p.dy && !p.same) coordinate_gradient(p, map, true);
    });
  with_map(p.map, [&](auto map) { gradient<T, decltype(map)>(p); });
}

template <class T>
void store_each(const StoreParams<T>* problems, int64_t count) {
  each_or_together<T>(problems, count, problems->x.d, store_all<T>, [](const StoreParams<T>* p, int64_t several) {
    with_any_map(p->map, p->power, [&](const auto& map) { store_together(p, several, map); });
  });
}
template <class T>
void gradient_each(const StoreGradParams<T>* problems, int64_t count) {
  each_or_together<T>(problems, count, problems->x.d, gradient_all<T>,
                      [](const StoreGradParams<T>* p, int64_t several) {
                        with_any_map(p->map, p->power, [&](const auto& map) { gradient_together(p, several, map); });
                      });
}
template <class T>
void gram_each(const GramParams<T>* problems, int64_t count) {
  each_or_together<T>(problems, count, problems->x.d, gram_all<T>, [](const GramParams<T>* p, int64_t several) {
    const ScoresTogether<T> scores(p, several, p->same);
    turn_back<false>(several, scores.size / kLanes<T>, scores.values(), [&](int u) { return p[u].out; });
  });
}
template <class T>
void gram_gradient_each(const GramGradParams<T>* problems, int64_t count) {
  each_or_together<T>(
      problems, count, problems->x.d, gram_gradient<T>, [](const GramGradParams<T>* p, int64_t several) {
        const ScoresTogether<T> scores(p, several, false);
        const int64_t pairs = p->x.n * p->y.n;
        const Turned<T> upstream(several, [&](int u) { return row_of_numbers(p[u].grad, pairs); });
        scores.gradient(
            upstream.data(), [&](int u) { return p[u].dx; }, [&](int u) { return p[u].dy; }, p->dparameters);
      });
}

}  // namespace

namespace NEARFAR_ISA {
void store(const StoreParams<float>* p, int64_t count) { store_each(p, count); }
void store(const StoreParams<double>* p, int64_t count) { store_each(p, count); }
void store_grad(const StoreGradParams<float>* p, int64_t count) { gradient_each(p, count); }
void store_grad(const StoreGradParams<double>* p, int64_t count) { gradient_each(p, count); }
void gram(const GramParams<float>* p, int64_t count) { gram_each(p, count); }
void gram(const GramParams<double>* p, int64_t count) { gram_each(p, count); }
void gram_grad(const GramGradParams<float>* p, int64_t count) { gram_gradient_each(p, count); }
void gram_grad(const GramGradParams<double>* p, int64_t count) { gram_gradient_each(p, count); }
}  // namespace NEARFAR_ISA
}  // namespace nearfar
