// The only door to threads: run independent tasks on torch's OpenMP threads where torch is imported, else on a small
// pool of std::thread.
//
// Torch's threads spin between its operations; a second set of workers would fight them for the cores. We link no
// OpenMP: no second runtime enters the process, the pool survives fork (a child starts with an empty one) and is clean
// under thread sanitizers. Tasks are numbered by the shape of the problem, never by the number of threads, so every
// result is bitwise the same for any thread count: a task owns what it writes, and partial results are merged in task
// order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace nearfar {

/// Calls fn(context, task, worker) for every task in [0, tasks), on at most `threads` threads; worker is in
/// [0, worker_count(tasks, threads)). The first exception is rethrown here after all workers have stopped. A call from
/// inside a task, or while another thread holds the pool, runs on the calling thread alone.
void run_tasks(int64_t tasks, int threads, void (*fn)(void* context, int64_t task, int worker), void* context);

/// While it lives, torch's threads stand by for the tasks of this thread, where torch is imported and has as many. One
/// of these for an operation, not for each of its phases: in the end OpenMP waits for every thread, also for one that
/// had no core and came too late to work.
class StandBy {
 public:
  explicit StandBy(int threads);
  ~StandBy();
  StandBy(const StandBy&) = delete;

 private:
  struct Region;
  std::unique_ptr<Region> region_;
};

inline constexpr int kMaxThreads = 256;
int worker_count(int64_t tasks, int threads);

/// Called about every 50 ms by the thread that entered run_tasks, between two tasks; may throw to stop the call.
void set_interrupt_check(void (*check)());

/// 64-byte aligned memory for packed operands and partial results; throws std::bad_alloc. Small blocks are kept by the
/// thread that releases them.
void* workspace_acquire(size_t bytes);
void workspace_release(void* pointer, size_t bytes) noexcept;

/// Asks for huge pages under a large result that is about to be written for the first time: page faults otherwise cost
/// more than the arithmetic of a distance matrix. A hint; never fails.
void advise_huge_pages(void* data, int64_t bytes);

/// What the affinity mask and the cgroup quota let this process use.
int available_cpus();

namespace {

template <class F>
struct Task {
  static void call(void* context, int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); }
};

template <class F>
inline void parallel_for(int64_t tasks, int threads, F f) {
  run_tasks(tasks, threads, &Task<F>::call, &f);
}

/// Workspace that frees itself; not initialised.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : bytes_(static_cast<size_t>(count) * sizeof(T)), data_(static_cast<T*>(workspace_acquire(bytes_))) {}
  ~Buffer() { workspace_release(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer& operator=(Buffer&& other) noexcept {
    T* data = data_;
    const size_t bytes = bytes_;
    data_ = other.data_, bytes_ = other.bytes_;
    other.data_ = data, other.bytes_ = bytes;
    return *this;
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_ = 0;
  T* data_ = nullptr;
};

}  // namespace
}  // namespace nearfar
