// Fibers for emulate.hpp: made by ucontext, switched by _setjmp and _longjmp, which make no system call.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "cuda/portable.hpp"

namespace nearfar::cuda::emulation {
namespace {

constexpr size_t kStack = 256 << 10;

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
};

struct Machine {
  ucontext_t start[kThreads];
  jmp_buf fiber[kThreads], home;
  bool started[kThreads], done[kThreads];
  int order[kThreads];
  char* stacks = nullptr;
  int current = 0;
  int64_t block = 0, blocks = 0;
  uint64_t progress = 0, random = 0;
  Barrier of_block, of_warp[kWarps];
  alignas(64) char slots[kThreads][64];
  void (*body)(const void*);
  const void* kernel;
};

Machine* machine = nullptr;
std::mutex one_at_a_time;

void leave() {
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
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == all) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++machine->progress;
    return;
  }
  while (barrier.generation == generation) leave();
}

void resume(int thread) {
  machine->current = thread;
  if (_setjmp(machine->home)) return;
  if (machine->started[thread]) _longjmp(machine->fiber[thread], 1);
  machine->started[thread] = true;
  setcontext(&machine->start[thread]);
}

void run_block() {
  Machine& m = *machine;
  m.of_block = Barrier();
  for (Barrier& barrier : m.of_warp) barrier = Barrier();
  for (bool& done : m.done) done = false;
  for (int left = kThreads; left > 0;) {
    const uint64_t before = m.progress;
    left = 0;
    for (int k = 0; k < kThreads; ++k) {
      if (!m.done[m.order[k]]) resume(m.order[k]);
      left += !m.done[m.order[k]];
    }
    if (left && m.progress == before) {
      std::fprintf(stderr, "emulation: %d threads of block %lld wait for others that never come\n", left,
                   static_cast<long long>(m.block));
      std::abort();
    }
  }
}

}  // namespace

int thread() { return machine->current; }
int64_t block() { return machine->block; }
int64_t blocks() { return machine->blocks; }
void sync_block() { wait(machine->of_block, kThreads); }
void sync_warp() { wait(machine->of_warp[machine->current / kWarp], kWarp); }
void* slot(int lane) { return machine->slots[machine->current / kWarp * kWarp + lane]; }

void run(int64_t blocks, void (*body)(const void*), const void* kernel) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (!machine) {
    machine = new Machine;
    machine->stacks = static_cast<char*>(
        mmap(nullptr, kThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int t = 0; t < kThreads; ++t) {
      ucontext_t& start = machine->start[t];
      machine->started[t] = false;
      getcontext(&start);
      start.uc_stack.ss_sp = machine->stacks + t * kStack;
      start.uc_stack.ss_size = kStack;
      start.uc_link = nullptr;
      makecontext(&start, live, 0);
    }
  }
  const char* seed = std::getenv("NEARFAR_EMULATE_ORDER");
  machine->random = seed ? std::strtoull(seed, nullptr, 10) : 0;
  for (int t = 0; t < kThreads; ++t) machine->order[t] = t;
  for (int t = kThreads - 1; t > 0 && machine->random; --t) {
    machine->random = machine->random * 6364136223846793005u + 1442695040888963407u;
    const int other = static_cast<int>((machine->random >> 33) % (t + 1));
    const int mine = machine->order[t];
    machine->order[t] = machine->order[other];
    machine->order[other] = mine;
  }
  machine->body = body;
  machine->kernel = kernel;
  machine->blocks = blocks;
  for (machine->block = 0; machine->block < blocks; ++machine->block) run_block();
}

}  // namespace nearfar::cuda::emulation
