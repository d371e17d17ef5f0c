// Fibers for emulate.hpp: made by ucontext, switched by _setjmp and _longjmp, which make no system call.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "cuda/hopper.hpp"

namespace nearfar::cuda::emulation {
namespace {

// No multiple of a page behind each other: what the fibers touch last would lie in the same few lines of the cache.
constexpr size_t kStack = (256 << 10) + 17 * 64;
constexpr int kMostThreads = 384, kGroup = 128, kGroups = kMostThreads / kGroup;  // threads of a warpgroup
// What a block of sm_90 may ask for. Its memory begins behind some of its own, at a multiple of 1024.
constexpr int kLarge = 227 << 10, kLargeBegin = 1024;

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

/// mbarrier: a phase ends when nobody is pending and all announced bytes have come ("Phase of the mbarrier object").
struct PhaseBarrier {
  uint16_t count, pending;
  int32_t phase : 1, bytes : 31;
};
static_assert(sizeof(PhaseBarrier) == sizeof(uint64_t), "as large as the real one");

struct Copy {
  void* to;
  const void* from;
  int bytes;
  uint64_t* barrier;
  bool adds;  // float32 numbers
};
/// Copies that have been given and not done.
struct Copies {
  static constexpr int kMost = 256;
  Copy queue[kMost];
  int count = 0;
};

/// A product of a warpgroup: done when all its threads have given it and one of them waits.
struct Multiply {
  uint64_t a, b;
  Operand type;
  int columns, given;
  bool transpose_a, transpose_b, fresh;
  float* c[kGroup];
  const uint32_t* in_registers[kGroup];  // of a; null: as its descriptor says
};
struct Warpgroup {
  static constexpr int kMost = 64;
  Multiply queue[kMost];
  uint64_t ends[kMost];  // of committed groups
  uint64_t ready, done;  // products that all have given, that are done
  uint64_t given[kGroup], committed[kGroup];
};

struct Machine {
  ucontext_t start[kMostThreads];
  jmp_buf fiber[kMostThreads], home;
  bool started[kMostThreads], done[kMostThreads];
  int threads = 0, order[kMostThreads];  // of the block that runs
  char* stacks = nullptr;
  int current = 0;
  int64_t block = 0, blocks = 0;
  uint64_t progress = 0, random = 0;
  const uint64_t* counter[kMostThreads];  // a fiber goes on when this has come so far
  uint64_t target[kMostThreads];
  bool late = false;   // copies to shared memory
  bool apart = false;  // each warpgroup goes as far as it can without the other
  Barrier of_all, of_block, of_warp[kMostThreads / kWarp];
  alignas(64) char slots[kMostThreads][64];
  char* large = nullptr;
  int large_bytes = 0;
  Copies loads, stores;
  Warpgroup groups[kGroups];
  void (*body)(const void*);
  const void* kernel;
};

Machine* machine = nullptr;
std::mutex one_at_a_time;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulation: %s (block %lld, thread %d)\n", what, static_cast<long long>(machine->block),
               machine->current);
  std::abort();
}
void expect(bool condition, const char* what) {
  if (!condition) fail(what);
}

/// Until a counter, which others raise, has come so far; or for a round.
void leave(const uint64_t& counter = machine->progress, uint64_t target = 0) {
  machine->counter[machine->current] = &counter;
  machine->target[machine->current] = target;
  if (!_setjmp(machine->fiber[machine->current])) _longjmp(machine->home, 1);
}

/// A fiber lives for ever: one round for every block.
void live() {
  for (;;) {
    machine->body(machine->kernel);
    machine->done[machine->current] = true;
    ++machine->progress;
    leave();
  }
}

void wait(Barrier& barrier, int all) {
  if (++barrier.arrived < all) return leave(barrier.generation, barrier.generation + 1);
  barrier.arrived = 0;
  ++barrier.generation;
  ++machine->progress;
}

void resume(int thread) {
  if (*machine->counter[thread] < machine->target[thread]) return;
  machine->current = thread;
  if (_setjmp(machine->home)) return;
  if (machine->started[thread]) _longjmp(machine->fiber[thread], 1);
  machine->started[thread] = true;
  setcontext(&machine->start[thread]);
}

void run_block() {
  Machine& m = *machine;
  m.of_all = m.of_block = Barrier();
  for (Barrier& barrier : m.of_warp) barrier = Barrier();
  for (int thread = 0; thread < kMostThreads; ++thread) m.done[thread] = thread >= m.threads;
  std::memset(m.large, 0xff, static_cast<size_t>(m.large_bytes));  // NaN
  for (Warpgroup& group : m.groups) group = Warpgroup();
  for (int left = m.threads; left > 0;) {
    const uint64_t before = m.progress;
    for (int group = 0; group < kGroups; ++group) {
      uint64_t at;
      do {
        at = m.progress;
        for (const int thread : m.order)
          if (!m.done[thread] && (!m.apart || thread / kGroup == group)) resume(thread);
      } while (m.apart && m.progress != at);
      if (!m.apart) break;
    }
    left = 0;
    for (bool done : m.done) left += !done;
    if (left && m.progress == before) {
      std::fprintf(stderr, "emulation: %d threads of block %lld wait for others that never come\n", left,
                   static_cast<long long>(m.block));
      std::abort();
    }
  }
  for (const Warpgroup& group : m.groups) expect(group.done == group.ready, "a product that nobody waits for");
  expect(m.loads.count == 0 && m.stores.count == 0, "a copy that nobody waits for");
}

// ---- sm_90 ---------------------------------------------------------------------------------------------------------

char* at_address(uint32_t address, uint32_t bytes) {
  expect(address >= kLargeBegin && address + bytes <= uint32_t(kLargeBegin + machine->large_bytes),
         "an address outside of shared memory");
  return machine->large + (address - kLargeBegin);
}

PhaseBarrier& phase_of(uint64_t* barrier) { return *reinterpret_cast<PhaseBarrier*>(barrier); }

void end_phase(PhaseBarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.phase = ~barrier.phase;
  barrier.pending = barrier.count;
  ++machine->progress;
}

void finish(const Copy& copy) {
  if (copy.adds) {
    float* to = static_cast<float*>(copy.to);
    for (int k = 0; k < copy.bytes / 4; ++k) to[k] += static_cast<const float*>(copy.from)[k];
  } else {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  }
  if (!copy.barrier) return;
  PhaseBarrier& barrier = phase_of(copy.barrier);
  barrier.bytes -= copy.bytes;
  end_phase(barrier);
}
/// Those of a barrier.
void finish(Copies& copies, const uint64_t* barrier) {
  int left = 0;
  for (int k = 0; k < copies.count; ++k) {
    const Copy copy = copies.queue[k];
    if (copy.barrier == barrier) {
      finish(copy);
    } else {
      copies.queue[left++] = copy;
    }
  }
  copies.count = left;
}
void put(Copies& copies, const Copy& copy) {
  expect(copy.bytes % 16 == 0 && reinterpret_cast<uintptr_t>(copy.to) % 16 == 0 &&
             reinterpret_cast<uintptr_t>(copy.from) % 16 == 0,
         "a bulk copy that is not of multiples of 16 bytes");
  expect(copies.count < Copies::kMost, "too many copies in flight");
  copies.queue[copies.count++] = copy;
}

int size_of(Operand type) { return type == Operand::tf32 ? 4 : 2; }

float element(const char* at, Operand type) {
  uint32_t bits = 0;
  std::memcpy(&bits, at, static_cast<size_t>(size_of(type)));
  if (type == Operand::f16) return half_to_float(static_cast<uint16_t>(bits));
  if (type == Operand::bf16) return float_of(bits << 16);
  return float_of(bits & 0xffffe000u);  // the tensor cores do not read the rest
}

/// Lines of an operand, 32 bytes along the sum, as out[line * line_step + k * step] ("Matrix Descriptor Format",
/// "Canonical Layouts", 128-byte swizzle). K-major: eight lines of 128 bytes lie together, `stride` is from eight to
/// the next. MN-major: eight along the sum, of 128 bytes of lines, and `leading` is from 128 bytes of lines to the
/// next.
void read_operand(uint64_t descriptor, Operand type, bool transpose, int lines, double* out, int line_step, int step) {
  const int size = size_of(type);
  const auto field = [&](int from) { return static_cast<uint32_t>(descriptor >> from & 0x3fff) * 16; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  expect(descriptor >> 62 == 1, "a descriptor of another swizzle than 128 bytes");
  expect((descriptor >> 49 & 7) == 0, "a descriptor with a base offset");
  expect(!transpose || size == 2, "only 16-bit operands may lie along the lines");
  const int depth = 32 / size, wide = 128 / size;
  for (int line = 0; line < lines; ++line)
    for (int k = 0; k < depth; ++k) {
      const uint32_t l = static_cast<uint32_t>(line), d = static_cast<uint32_t>(k), w = static_cast<uint32_t>(wide);
      const uint32_t bytes = static_cast<uint32_t>(size);
      const uint32_t plain = start + (transpose ? l / w * leading + d / 8 * stride + d % 8 * 128 + l % w * bytes
                                                : l / 8 * stride + l % 8 * 128 + d * bytes);
      const uint32_t address = plain ^ (plain >> 7 & 7) << 4;  // Swizzle<3, 4, 3>
      out[line * line_step + k * step] = static_cast<double>(element(at_address(address, bytes), type));
    }
}

/// The same of float16 in registers ("Register Fragments"): out[row][k] of 64 x 16.
void read_registers(const uint32_t* const (&words)[kGroup], double* out) {
  for (int t = 0; t < kGroup; ++t)
    for (int half = 0; half < 8; ++half) {
      const int word = half / 2, row = t / 32 * 16 + t % 32 / 4 + word % 2 * 8, k = t % 4 * 2 + word / 2 * 8 + half % 2;
      out[row * 16 + k] = static_cast<double>(half_to_float(static_cast<uint16_t>(words[t][word] >> half % 2 * 16)));
    }
}

/// Sums are cut off, not rounded, as tensor cores do.
float truncated(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(value) ? float_of(bits_of(nearest) - 1) : nearest;
}

/// The binary order of a number; far below all others of 0, far above them of what is not finite.
constexpr int kFar = 1 << 20;
int order(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023;
  return value == 0 ? -kFar : exponent == 1024 ? 4 * kFar : exponent;
}
double power_of_two(int exponent) {
  const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// "Register Fragments": thread t of the group holds rows t / 32 * 16 + t % 32 / 4 and the one eight below, and of
/// every eight columns two from t % 4 * 2 on.
///
/// Each product, and what it is added to, is cut off where the largest of them has its last bit and two more, as far as
/// is known of Hopper: sums of one sign lose more by that than by a sum that is cut off once.
void multiply(const Multiply& m) {
  constexpr int kRows = 64, kMostColumns = 256, kMostDepth = 16;
  constexpr int kBits = 23 + 2, kLeast = -500;  // no product is as small
  static double a[kRows * kMostDepth], b[kMostDepth * kMostColumns], scale[kMostColumns];
  static int a_order[kRows * kMostDepth], b_order[kMostDepth * kMostColumns], most[kMostColumns];
  static int64_t sums[kMostColumns];
  const int depth = 32 / size_of(m.type);
  if (m.in_registers[0]) {
    read_registers(m.in_registers, a);
  } else {
    read_operand(m.a, m.type, m.transpose_a, kRows, a, depth, 1);
  }
  read_operand(m.b, m.type, m.transpose_b, m.columns, b, 1, kMostColumns);
  for (int k = 0; k < kRows * depth; ++k) a_order[k] = order(a[k]);
  for (int k = 0; k < depth * kMostColumns; ++k) b_order[k] = order(b[k]);
  for (int row = 0; row < kRows; ++row) {
    const auto place = [&](int column) -> float& {
      return m.c[row / 16 * 32 + row % 8 * 4 + column % 8 / 2][column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
    };
    const auto begin = [&](int column) { return m.fresh ? 0.0 : static_cast<double>(place(column)); };
    for (int column = 0; column < m.columns; ++column) most[column] = std::max(kLeast, order(begin(column)));
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < m.columns; ++column)
        most[column] = std::max(most[column], a_order[row * depth + k] + b_order[k * kMostColumns + column]);
    for (int column = 0; column < m.columns; ++column) {
      scale[column] = most[column] > kFar ? 0 : power_of_two(kBits - most[column]);
      sums[column] = most[column] > kFar ? 0 : static_cast<int64_t>(begin(column) * scale[column]);
    }
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < m.columns; ++column)
        if (most[column] <= kFar)
          sums[column] += static_cast<int64_t>(a[row * depth + k] * b[k * kMostColumns + column] * scale[column]);
    for (int column = 0; column < m.columns; ++column) {
      if (most[column] <= kFar) {
        place(column) = truncated(static_cast<double>(sums[column]) * power_of_two(most[column] - kBits));
        continue;
      }
      double sum = begin(column);
      for (int k = 0; k < depth; ++k) sum += a[row * depth + k] * b[k * kMostColumns + column];
      place(column) = static_cast<float>(sum);
    }
  }
}

Warpgroup& own_group() { return machine->groups[machine->current / kGroup]; }

/// A thread's part of a product, which begins when all of the warpgroup have given theirs.
void give(const Multiply& product, float* c, const uint32_t* in_registers) {
  sync_warp();
  Warpgroup& group = own_group();
  const int own = machine->current % kGroup;
  const uint64_t at = group.given[own]++;
  expect(at - group.done < Warpgroup::kMost, "too many products in flight");
  Multiply& m = group.queue[at % Warpgroup::kMost];
  if (m.given == 0) m = product;
  expect(m.a == product.a && m.b == product.b && m.type == product.type && m.columns == product.columns,
         "threads of a warpgroup that give different products");
  m.c[own] = c;
  m.in_registers[own] = in_registers;
  if (++m.given < kGroup) return;
  ++group.ready;
  ++machine->progress;
}

}  // namespace

int thread() { return machine->current; }
int64_t block() { return machine->block; }
int64_t blocks() { return machine->blocks; }
void sync_block() { wait(machine->of_block, kThreads); }
void sync_all() { wait(machine->of_all, machine->threads); }
void sync_warp() { wait(machine->of_warp[machine->current / kWarp], kWarp); }
void* slot(int lane) { return machine->slots[machine->current / kWarp * kWarp + lane]; }

uint32_t shared_address(const void* at) {
  const int64_t offset = static_cast<const char*>(at) - machine->large;
  expect(offset >= 0 && offset <= machine->large_bytes, "the shared address of something else");
  return static_cast<uint32_t>(kLargeBegin + offset);
}

void barrier_init(uint64_t* barrier, int count) {
  const uint16_t narrow = static_cast<uint16_t>(count);
  phase_of(barrier) = {narrow, narrow, 0, 0};
}
void barrier_arrive(uint64_t* barrier) {
  PhaseBarrier& own = phase_of(barrier);
  expect(own.pending > 0, "more arrivals at a barrier than it counts");
  --own.pending;
  end_phase(own);
}
void barrier_expect(uint64_t* barrier, int bytes) {
  PhaseBarrier& own = phase_of(barrier);
  own.bytes += bytes;
  barrier_arrive(barrier);
}
void barrier_wait(uint64_t* barrier, int parity) {
  finish(machine->loads, barrier);
  while ((phase_of(barrier).phase & 1) == parity) {
    leave();
    finish(machine->loads, barrier);
  }
}

void bulk_load(void* to, const void* from, int bytes, uint64_t* barrier) {
  expect(shared_address(to) + bytes <= uint32_t(kLargeBegin + machine->large_bytes), "a copy past shared memory");
  put(machine->loads, {to, from, bytes, barrier, false});
  if (!machine->late) finish(machine->loads, barrier);
}
void bulk_store(void* to, const void* from, int bytes) { put(machine->stores, {to, from, bytes, nullptr, false}); }
void bulk_add(float* to, const void* from, int bytes) { put(machine->stores, {to, from, bytes, nullptr, true}); }

void wgmma_begin() { sync_warp(); }
void wgmma_commit() {
  sync_warp();
  Warpgroup& group = own_group();
  const int own = machine->current % kGroup;
  group.ends[group.committed[own]++ % Warpgroup::kMost] = group.given[own];
}

void store_word(uint32_t address, uint32_t bits) {
  std::memcpy(at_address(address, sizeof(bits)), &bits, sizeof(bits));
}
void copy_piece(void* to, uint32_t address) {
  expect(address % 16 == 0, "a piece that is not aligned");
  std::memcpy(to, at_address(address, 16), 16);
}

char* large_memory() { return machine->large; }

void bulk_stored() { finish(machine->stores, nullptr); }

void wgmma(float* c, int columns, uint64_t a, uint64_t b, Operand type, bool transpose_a, bool transpose_b,
           bool fresh) {
  give({a, b, type, columns, 0, transpose_a, transpose_b, fresh, {}, {}}, c, nullptr);
}
void wgmma_registers(float* c, int columns, const uint32_t* a, uint64_t b, bool fresh) {
  give({0, b, Operand::f16, columns, 0, false, true, fresh, {}, {}}, c, a);
}

void wgmma_wait(int left) {
  sync_warp();
  Warpgroup& group = own_group();
  const uint64_t committed = group.committed[machine->current % kGroup], later = static_cast<uint64_t>(left);
  if (committed <= later) return;
  const uint64_t end = group.ends[(committed - later - 1) % Warpgroup::kMost];
  if (group.ready < end) leave(group.ready, end);
  for (; group.done < end; ++group.done) {
    Multiply& m = group.queue[group.done % Warpgroup::kMost];
    multiply(m);
    m.given = 0;
  }
}

void run(int64_t blocks, void (*body)(const void*), const void* kernel, int threads, int large_bytes) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (!machine) {
    machine = new Machine;
    machine->large = static_cast<char*>(std::aligned_alloc(1024, kLarge));
    machine->stacks = static_cast<char*>(mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int t = 0; t < kMostThreads; ++t) {
      ucontext_t& start = machine->start[t];
      machine->started[t] = false;
      machine->counter[t] = &machine->progress;
      machine->target[t] = 0;
      getcontext(&start);
      start.uc_stack.ss_sp = machine->stacks + t * kStack;
      start.uc_stack.ss_size = kStack;
      start.uc_link = nullptr;
      makecontext(&start, live, 0);
    }
  }
  const char* seed = std::getenv("NEARFAR_EMULATE_ORDER");
  machine->random = seed ? std::strtoull(seed, nullptr, 10) : 0;
  machine->late = machine->random & 1;
  machine->apart = machine->random & 2;
  expect(threads % kWarp == 0 && threads <= kMostThreads, "more threads than a block may have here");
  machine->threads = threads;
  for (int t = 0; t < kMostThreads; ++t) machine->order[t] = t;
  for (int t = threads - 1; t > 0 && machine->random; --t) {
    machine->random = machine->random * 6364136223846793005u + 1442695040888963407u;
    const int other = static_cast<int>((machine->random >> 33) % (t + 1));
    const int mine = machine->order[t];
    machine->order[t] = machine->order[other];
    machine->order[other] = mine;
  }
  expect(large_bytes <= kLarge, "more shared memory than a block may have");
  machine->large_bytes = large_bytes;
  machine->body = body;
  machine->kernel = kernel;
  machine->blocks = blocks;
  for (machine->block = 0; machine->block < blocks; ++machine->block) run_block();
}

}  // namespace nearfar::cuda::emulation
