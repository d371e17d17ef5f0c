// Select: for every row the k best columns. k-means assignment (k = 1) and k nearest neighbours.
//
// Columns are scanned in ascending order and replace the worst kept one, of equals the last, only when strictly better,
// so ties go to the lower index; columns in another order (boxes.hpp) replace an equal one of a higher index too. Which
// columns are kept matters, not where: they are measured again from the original rows and sorted by (value, index) in
// the end. Threads with too few rows share the columns: parts have lists of their own, whose k best keys are the k best
// of all, however many parts there are.
#include "cpu/arrangement.hpp"
#include "cpu/boxes.hpp"
#include "cpu/keep.hpp"

namespace nearfar {
namespace {

/// Who takes the pairs: strips of rows, all columns packed; parts of the columns, packed a chunk at a time; or such
/// parts pair by pair, with nothing packed, where rows are so few that they would leave most lanes empty.
enum class By { strips, columns, pairs };

template <class T, Key KEY, class Score = SquaredDifference>
class Select {
  using P = Policy<T>;
  static constexpr int NR = P::NR;
  static constexpr int64_t kTried = 8;
  static constexpr bool kScreens = std::is_same_v<T, float> && KEY != Key::direct && KEY != Key::coordinate;
  static constexpr bool kArranges = KEY == Key::direct || KEY == Key::coordinate;
  using Panel = typename Keep<T, KEY, Score>::Panel;

 public:
  /// screen: null where every column is scored in full. boxes: those of columns that are packed near ones together.
  Select(const SelectParams<T>& params, const Operands<T>& operands, By by, const Screen* screen = nullptr,
         const Boxes<T>* boxes = nullptr, Score score = {})
      : p(params),
        n(p.x.n),
        m(p.y.n),
        k(p.k),
        room_(padded<T>(k)),
        o(operands),
        measure{o, score},
        keep_(o, measure, k, p.exclude_self),
        by_(by),
        screen_(kScreens ? screen : nullptr),
        boxes_(kArranges ? boxes : nullptr) {}

  /// False where boxes ruled out too little to go on with them: nothing is answered then.
  bool run() {
    strips_ = ceil_div(n, P::kStripRows);
    parts_ = parts();
    kept_ = Buffer<T>(parts_ * strips_ * P::kStripRows * room_);
    index_ = Buffer<int64_t>(parts_ * strips_ * P::kStripRows * room_);
    if constexpr (kArranges)
      if (boxes_ && !boxes_help()) return false;
    if (by_ != By::strips) {
      parallel_for(parts_, p.threads, [&](int64_t part, int) { by_ == By::pairs ? pairs(part) : columns(part); });
    } else {
      parallel_for(strips_ * parts_, p.threads, [&](int64_t task, int) { strip(task % strips_, task / strips_); });
    }
    parallel_for(strips_, p.threads, [&](int64_t s, int) { finish(s); });
    return true;
  }

 private:
  /// The panels of some rows, ready for columns to go by.
  struct Opened {
    Buffer<T> packed, squares, worst;
    Buffer<IntOf<T>> last;
    Buffer<int64_t> count, place;

    Opened(const Operands<T>& o, int64_t row, int64_t panels, int64_t k, T* kept, int64_t* index)
        : packed(panels * NR * o.d),
          squares(panels * NR),
          worst(panels * NR),
          last(panels * NR),
          count(panels * NR),
          place(panels * NR),
          row_(row),
          lists_{k, padded<T>(k), worst.get(), last.get(), count.get(), place.get(), kept, index} {
      Buffer<T> rows(o.row_buffer());
      for (int64_t q = 0; q < panels; ++q)
        o.pack_panel(row + q * NR, T(1), rows.get(), packed.get() + q * NR * o.d, squares.get() + q * NR);
      lists_.open(panels * NR, o.x.n() - row);
    }

    Panel panel(int64_t q, int64_t d, const T* columns) const {
      const int64_t lane = q * NR;
      return {row_ + lane, packed.get() + lane * d, squares.get() + lane, columns, lists_.from(lane)};
    }

   private:
    const int64_t row_;
    const Lists<T> lists_;
  };

  /// The nearest column alone is found by another pass, which does not cut the columns.
  bool nearest() const {
    return KEY != Key::coordinate && !boxes_ && by_ == By::strips && k == 1 && !p.exclude_self &&
           !(screen_ && KEY == Key::negative_dot);
  }

  /// Each part has the first columns of its lists to keep, so there are no more than threads need.
  int64_t parts() const {
    const int64_t threads = p.threads, most = screen_ ? screen_->runs() : o.chunks.count;
    if (nearest() || boxes_ || most == 0 || strips_ == 0) return 1;
    int64_t wanted = threads == 1 ? 1 : 2 * threads;
    if (by_ == By::strips) wanted = strips_ % threads == 0 || strips_ >= 4 * threads ? 1 : ceil_div(wanted, strips_);
    return wanted < most ? wanted : most;
  }

  /// Tiles of a part of the columns, and the runs that a screen has of them.
  struct Part {
    int64_t run, last_run, tile, last_tile;
  };
  Part part_of(int64_t part) const {
    if (!screen_) {
      const int64_t chunk = o.chunks.count * part / parts_, last = o.chunks.count * (part + 1) / parts_;
      return {0, 0, o.chunks.tile_begin(chunk), last ? o.chunks.tile_end(last - 1) : 0};
    }
    const int64_t run = screen_->runs() * part / parts_, last = screen_->runs() * (part + 1) / parts_;
    return {run, last, screen_->run_begin(run) / P::MR, ceil_div(screen_->run_end(last - 1), P::MR)};
  }

  /// Columns of tiles [t0, t1) go by a panel, as its first or after others.
  template <bool ARRANGED = false>
  void score(int64_t t0, int64_t t1, const T* tiles, T* block, const Panel& panel, bool first) const {
    const int64_t column = t0 * P::MR, end = t1 * P::MR < m ? t1 * P::MR : m;
    if constexpr (KEY == Key::coordinate) {
      score_block(o.d, t1 - t0, tiles, o.tile_stride, panel.packed, block, measure.score);
    } else {
      o.raw_block(t1 - t0, tiles, panel.packed, block);
    }
    if (first) keep_.set_bars(block, column, end, panel);
    keep_.template scan<ARRANGED>(block, column, end, panel);
  }

  /// A strip of rows against a part of the columns.
  void strip(int64_t s, int64_t number) const {
    const int64_t row = s * P::kStripRows, place = (number * strips_ * P::kStripRows + row) * room_;
    T* kept = kept_.get() + place;
    int64_t* index = index_.get() + place;
    const int64_t panels = panels_of(s);
    if constexpr (kArranges)
      if (boxes_) return static_cast<void>(visit(s, tried(s) ? 1 : 0, panels));
    Lists<T>::clear(kept, index, P::kStripRows, room_);
    if constexpr (KEY != Key::coordinate)
      if (nearest()) {
        int64_t found[P::kStripRows];
        Nearest<T, KEY>(o, screen_).strip(row, found);
        for (int64_t i = 0; i < P::kStripRows; ++i) index[i * room_] = found[i];
        return;
      }
    const Part part = part_of(number);
    Buffer<T> block(o.chunks.tiles_each * P::MR * NR);
    bool open[P::kPanels];
    for (int64_t q = 0; q < panels; ++q) open[q] = true;
    if constexpr (kScreens)
      if (screen_ && screen_->helps()) screened(row, panels, part, open, kept, index);
    for (int64_t first = 0, last; first < panels; first = last) {
      for (last = first + 1; last < panels && open[last] == open[first];) ++last;
      if (!open[first]) continue;
      const Opened r(o, row + first * NR, last - first, k, kept + first * NR * room_, index + first * NR * room_);
      for (int64_t t0 = part.tile, t1; t0 < part.last_tile; t0 = t1) {
        t1 = t0 + o.chunks.tiles_each < part.last_tile ? t0 + o.chunks.tiles_each : part.last_tile;
        for (int64_t q = 0; q < last - first; ++q)
          score(t0, t1, o.tile(t0), block.get(), r.panel(q, o.d, o.squares(0)), t0 == part.tile);
      }
    }
  }

  int64_t panels_of(int64_t s) const {
    const int64_t rows = n - s * P::kStripRows;
    return ceil_div(rows < P::kStripRows ? rows : P::kStripRows, NR);
  }

  /// The same where near columns are together: panels [first, last) of a strip meet those that can be among their
  /// nearest. How many tiles these were.
  int64_t visit(int64_t s, int64_t first, int64_t last) const {
    const int64_t row = s * P::kStripRows + first * NR;
    T* kept = kept_.get() + row * room_;
    int64_t* index = index_.get() + row * room_;
    Lists<T>::clear(kept, index, (last - first) * NR, room_);
    const Opened r(o, row, last - first, k, kept, index);
    const typename Boxes<T>::Visits visits(*boxes_);
    Buffer<T> block(o.chunks.tiles_each * P::MR * NR);
    int64_t met = 0;
    for (int64_t q = 0; q < last - first; ++q) {
      const Panel panel = r.panel(q, o.d, o.squares(0));
      met += boxes_->visit(
          panel.packed, panel.lists, n - panel.row, measure.score, visits,
          [&](int64_t t0, int64_t t1, bool home) { score<true>(t0, t1, o.tile(t0), block.get(), panel, home); });
    }
    return met;
  }

  /// The first panels of a few strips, evenly spread, go ahead.
  int64_t apart() const { return ceil_div(strips_, kTried); }
  bool tried(int64_t s) const { return s % apart() == 0; }

  /// Whether boxes rule out half of the tiles for those: a tile that is met takes longer than one of the plain scan,
  /// and tiles that are not have been asked for. Counted is what the shape fixes, so threads do not matter.
  bool boxes_help() const {
    const int64_t count = ceil_div(strips_, apart());
    int64_t met = 0;
    parallel_for(count, p.threads,
                 [&](int64_t t, int) { __atomic_fetch_add(&met, visit(t * apart(), 0, 1), __ATOMIC_RELAXED); });
    return p.screening == Screening::always || 2 * met <= count * o.chunks.tiles;
  }

  /// The same by the ranks that columns can have: a column is wanted while its highest rank reaches the k-th best of
  /// the lowest. Panels with a row that no bound covers, or that wants too many, stay open.
  void screened(int64_t row, int64_t panels, const Part& part, bool* open, T* kept, int64_t* index) const {
    const int64_t width = 4 * k + 1024 < m ? 4 * k + 1024 : m, end = n - row;
    const int64_t columns = screen_->run_end(part.last_run - 1) - screen_->run_begin(part.run);
    Shortlist list;
    list.open(panels * NR, width);
    Buffer<T> rows(screen_->room(NR)), lowest(panels * NR * k), bars(panels * NR);
    Screen::Strip rounded;
    Screen::Ranks ranks;
    screen_->open(rounded, ranks);
    for (int64_t q = 0; q < panels; ++q) {
      read_rows<NR>(o.x, row + q * NR, rows.get());
      screen_->pack_panel(rows.get(), q, rounded);
      open[q] = !rounded.covered[q];
    }
    for (int64_t at = 0; at < panels * NR * k; ++at) lowest[at] = static_cast<T>(-kInfinity);
    // Lanes without a row want nothing.
    for (int64_t i = 0; i < panels * NR; ++i) bars[i] = static_cast<T>(i < end ? -kInfinity : kInfinity);
    for (int64_t run = part.run; run < part.last_run; ++run)
      for (int64_t q = 0; q < panels; ++q) {
        if (open[q]) continue;
        screen_->template block<false>(run, rounded, q, ranks, nullptr);
        open[q] = !want(ranks, run, row, q, rounded, list, lowest.get(), bars.get());
      }
    int64_t scored = 0;
    for (int64_t q = 0; q < panels; ++q) {
      const int64_t lanes = end - q * NR < NR ? end - q * NR : NR;
      if (open[q]) {
        scored += lanes * columns;
        continue;
      }
      Buffer<T> packed(NR * o.d), squares(NR);
      o.pack_panel(row + q * NR, T(1), rows.get(), packed.get(), squares.get());
      // The rows of y that the next row of x wants arrive meanwhile.
      const auto keep = [&](int64_t i) {
        list.keep(i, bars[i]);
        for (int64_t c = 0; c < list.count(i); ++c) o.y.prefetch(list.column(i, c));
      };
      keep(q * NR);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t i = q * NR + lane;
        if (lane + 1 < lanes) keep(i + 1);
        scored += list.count(i);
        settle(row + q * NR, lane, packed.get(), squares.get(), list, i, rows.get(), kept + i * room_,
               index + i * room_);
      }
    }
    screen_->report(scored, (end < panels * NR ? end : panels * NR) * columns);
  }

  /// Lists what a panel wants of a run; false where a row wants too many.
  bool want(const Screen::Ranks& ranks, int64_t run, int64_t row, int64_t q, const Screen::Strip& rounded,
            Shortlist& list, T* lowest, T* bars) const {
    const int64_t begin = screen_->run_begin(run), count = ranks.find(screen_->run_end(run) - begin, bars + q * NR);
    for (int64_t f = 0; f < count; ++f)
      for (unsigned lanes = ranks.found[f].lanes; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        const int64_t c = ranks.found[f].column, j = begin + c, i = q * NR + lane;
        const T upper = ranks.upper[c * NR + lane];
        if (!(upper >= bars[i]) || (p.exclude_self && row + i == j)) continue;  // the bar may have risen
        if (!list.add(i, {upper, static_cast<int32_t>(j)}, bars[i])) return false;
        const T low = screen_->lower(upper, rounded, i, j);
        T* best = lowest + i * k;
        if (!(low > best[k - 1])) continue;
        int64_t at = k - 1;
        for (; at > 0 && best[at - 1] < low; --at) best[at] = best[at - 1];
        best[at] = low;
        bars[i] = best[k - 1] - 2 * rounded.slack[i];
      }
    return true;
  }

  /// The k best of the columns that a row wants, by the keys that `score` would have given them: the same
  /// multiply-adds, with the columns along the lanes.
  void settle(int64_t row, int64_t lane, const T* panel, const T* squares, const Shortlist& list, int64_t listed_as,
              T* rows, T* kept, int64_t* places) const {
    const int64_t i = row + lane, listed = list.count(listed_as);
    int64_t count = 0;
    Buffer<T> packed(NR * o.d), pair(2 * o.d), value(k);
    Buffer<int64_t> index(k);
    for (int64_t first = 0; first < listed; first += NR) {
      // Past the last column, rows of zeros.
      read_rows_at<NR>(
          o.y, [&](int64_t c) { return first + c < listed ? list.column(listed_as, first + c) : m; }, rows);
      pack<NR>(rows, o.d, T(1), packed.get());
      Vec<T> sum[P::kVectors] = {};
      for (int64_t c = 0; c < o.d; ++c)
#pragma GCC unroll 2
        for (int v = 0; v < P::kVectors; ++v)
          Dot::accumulate(sum[v], splat<T>(panel[c * NR + lane]), load(packed.get() + c * NR + v * kLanes<T>));
      alignas(64) T scores[NR];
      for (int v = 0; v < P::kVectors; ++v) store(scores + v * kLanes<T>, sum[v]);
      for (int64_t c = 0; c < NR && first + c < listed; ++c) {
        const int64_t j = list.column(listed_as, first + c);
        const T own = KEY == Key::expanded ? squares[lane] : T(0);
        bool near = false;
        const T plain = keep_.key(scores[c], own, KEY == Key::expanded ? *o.squares(j) : T(0), near);
        add_sorted(near ? measure.near(i, j, pair.get()) : plain, j, value.get(), index.get(), count);
      }
    }
    for (int64_t c = 0; c < count; ++c) kept[c] = value[c], places[c] = index[c];
  }

  /// Adds what is below infinity to a list of the k best, sorted by (value, index).
  void add_sorted(T own, int64_t j, T* value, int64_t* index, int64_t& count) const {
    const auto after = [&](int64_t c) { return value[c] > own || (value[c] == own && index[c] > j); };
    if (!(own < static_cast<T>(kInfinity)) || (count == k && !after(k - 1))) return;
    int64_t place = count < k ? count++ : k - 1;
    for (; place > 0 && after(place - 1); --place) value[place] = value[place - 1], index[place] = index[place - 1];
    value[place] = own;
    index[place] = j;
  }

  /// A part of the columns, packed a chunk at a time, against all rows.
  void columns(int64_t part) const {
    const int64_t panels = ceil_div(n, NR), first = part * strips_ * P::kStripRows * room_, each = o.chunks.tiles_each;
    T* kept = kept_.get() + first;
    int64_t* index = index_.get() + first;
    Lists<T>::clear(kept, index, panels * NR, room_);
    const Opened r(o, 0, panels, k, kept, index);
    Buffer<T> rows(P::MR * padded<T>(o.d)), tiles(each * o.tile_stride), squares(each * P::MR),
        block(each * P::MR * NR);
    const int64_t begin = o.chunks.count * part / parts_;
    for (int64_t chunk = begin; chunk < o.chunks.count * (part + 1) / parts_; ++chunk) {
      const int64_t t0 = o.chunks.tile_begin(chunk), t1 = o.chunks.tile_end(chunk);
      o.pack_tiles(t0, t1, rows.get(), tiles.get(), squares.get());
      for (int64_t q = 0; q < panels; ++q)
        score(t0, t1, tiles.get(), block.get(), r.panel(q, o.d, squares.get() - t0 * P::MR), chunk == begin);
    }
  }

  /// A part of the columns against few rows, which would leave lanes empty: every pair is measured.
  void pairs(int64_t part) const {
    const int64_t first = part * strips_ * P::kStripRows * room_;
    T* kept = kept_.get() + first;
    int64_t* index = index_.get() + first;
    Lists<T>::clear(kept, index, n, room_);
    Buffer<T> rows(n * o.d), column(o.d), worst(n);
    Buffer<IntOf<T>> last(n);
    Buffer<int64_t> count(n), place(n);
    const Lists<T> lists{k, room_, worst.get(), last.get(), count.get(), place.get(), kept, index};
    lists.open(n, n);
    for (int64_t i = 0; i < n; ++i) o.x.get(i, rows.get() + i * o.d);
    for (int64_t j = m * part / parts_; j < m * (part + 1) / parts_; ++j) {
      const T* own = o.y.view(j, column.get());
      for (int64_t i = 0; i < n; ++i)
        if (const T value = measure(rows.get() + i * o.d, own); value < worst[i] && !(p.exclude_self && i == j))
          lists.keep(value, j, i);
    }
  }

  /// Merge the parts by their keys, measure what is left again, sort.
  void finish(int64_t s) const {
    Buffer<T> rows(2 * o.d), value(k);
    Buffer<int64_t> index(k), order(k);
    for (int64_t i = s * P::kStripRows; i < (s + 1) * P::kStripRows && i < n; ++i) {
      const int64_t own = o.x.row_at(i);
      int64_t kept = 0, count = 0;
      if (parts_ == 1) kept = Lists<T>::sort(k, room_, kept_.get() + i * room_, index_.get() + i * room_, order.get());
      for (int64_t part = 0; parts_ > 1 && part < parts_; ++part) {
        const int64_t at = (part * strips_ * P::kStripRows + i) * room_;
        for (int64_t c = at; c < at + k && index_[c] >= 0; ++c)
          add_sorted(kept_[c], index_[c], value.get(), order.get(), kept);
      }
      for (int64_t c = 0; c < kept; ++c)
        add_sorted(measure(own, order[c], rows.get()), order[c], value.get(), index.get(), count);
      for (int64_t c = 0; c < k; ++c) {
        p.value[own * k + c] = c < count ? result(value[c]) : static_cast<T>(__builtin_nan(""));
        p.index[own * k + c] = c < count ? index[c] : -1;
      }
    }
  }

  T result(T value) const {
    if (p.map == PairMap::euclidean) return std::sqrt(value);
    if (p.map == PairMap::minkowski) return static_cast<T>(std::pow(value, 1 / p.power));
    return p.map == PairMap::dot ? -value : value;
  }

  const SelectParams<T>& p;
  const int64_t n, m, k, room_;
  const Operands<T>& o;
  const Measure<T, KEY, Score> measure;
  const Keep<T, KEY, Score> keep_;
  const By by_;
  const Screen* screen_;
  const Boxes<T>* boxes_;
  int64_t strips_ = 0, parts_ = 1;
  Buffer<T> kept_;
  Buffer<int64_t> index_;
};

template <class T, Key KEY>
void run(const SelectParams<T>& p, const Operands<T>& o, By by) {
  if constexpr (std::is_same_v<T, float> && KEY != Key::direct)
    if (by == By::strips && screens(p.screening, p.y.n, o.d, p.k)) {
      const Screen screen(o, p.threads);
      Select<T, KEY>(p, o, by, &screen).run();
      return;
    }
  Select<T, KEY>(p, o, by).run();
}

/// In few dimensions: rows of both sets packed with near ones together. False, and no answer, where that does not help.
template <class T>
bool run_arranged(const SelectParams<T>& p) {
  using P = Policy<T>;
  const Arrangement<T> rows(Source<T>(p.x), P::kStripRows, P::NR, p.threads);
  const Arrangement<T> columns(Source<T>(p.y), Chunks::of<T>(p.y.n).tiles_each * P::MR, P::MR, p.threads);
  const bool by_difference = by_coordinate(p.map);
  const Operands<T> o(p.x, p.y, false, !by_difference, false, p.threads, ScoreKind::dot, true, rows.order(),
                      columns.order());
  const Boxes<T> boxes(o, p.threads);
  if (!by_difference) return Select<T, Key::direct>(p, o, By::strips, nullptr, &boxes).run();
  bool answered = false;
  with_coordinate_map(p.map, p.power, [&](auto map) {
    answered = Select<T, Key::coordinate, decltype(map.score)>(p, o, By::strips, nullptr, &boxes, map.score).run();
  });
  return answered;
}

template <class T>
void run(const SelectParams<T>& p) {
  const bool distance = p.map == PairMap::euclidean || p.map == PairMap::sqeuclidean;
  // A strip or two of rows against many columns: without a packed copy of them.
  constexpr int64_t kFew = 4;
  const int64_t strips = p.k == 1 || p.x.d > 256 ? 4 : 2;
  const bool columns = p.x.n < strips * Policy<T>::kStripRows && p.y.n >= 4096;
  const By by = p.x.n <= kFew ? By::pairs : columns ? By::columns : By::strips;
  if (by == By::strips && (distance || by_coordinate(p.map)) && arranges(p.screening, p.x.n, p.y.n, p.x.d) &&
      run_arranged(p))
    return;
  // A pair is measured from its differences: then distances need neither a centre nor an expansion.
  const Operands<T> o(p.x, p.y, p.normalize, distance && by != By::pairs, false, p.threads, ScoreKind::dot,
                      by == By::strips);
  if (by_coordinate(p.map))
    return with_coordinate_map(p.map, p.power, [&](auto map) {
      Select<T, Key::coordinate, decltype(map.score)>(p, o, by, nullptr, nullptr, map.score).run();
    });
  if (p.map == PairMap::one_minus_dot) return run<T, Key::cosine>(p, o, by);
  if (!distance) return run<T, Key::negative_dot>(p, o, by);
  if (o.expanded()) return run<T, Key::expanded>(p, o, by);
  run<T, Key::direct>(p, o, by);
}

}  // namespace

namespace NEARFAR_ISA {
void select(const SelectParams<float>& p) { run(p); }
#if !defined(NEARFAR_BASE)  // which a level with a base takes from there
void select(const SelectParams<double>& p) { run(p); }
#endif
}  // namespace NEARFAR_ISA
}  // namespace nearfar
