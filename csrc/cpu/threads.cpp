#include "cpu/threads.hpp"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <mutex>
#include <new>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nearfar {
namespace {

using Clock = std::chrono::steady_clock;

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // as long as a pause; most cores take `yield` for nothing
#endif
}

/// One call of run_tasks, shared by the threads that work on it.
struct Job {
  int64_t tasks = 0;
  void (*fn)(void*, int64_t, int) = nullptr;
  void* context = nullptr;
  std::atomic<int64_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex error_mutex;
  std::exception_ptr error;

  void fail() {
    std::lock_guard<std::mutex> lock(error_mutex);
    if (!error) error = std::current_exception();
    stop.store(true, std::memory_order_relaxed);
  }
};

std::atomic<void (*)()> interrupt_check{nullptr};
thread_local bool inside_task = false;

/// Numbers below 1e-38 are flushed to zero while a task runs: exp(-100) of a far pair adds nothing to a sum, but as a
/// denormal number it costs a hundred cycles in every operation that meets it.
struct FlushToZero {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  FlushToZero() { _mm_setcsr(before | 0x8040); }
  ~FlushToZero() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;
  FlushToZero() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    set(before | uint64_t(1) << 24);
  }
  ~FlushToZero() { set(before); }
  static void set(uint64_t fpcr) { asm volatile("msr fpcr, %0" : : "r"(fpcr) : "memory"); }
#endif
};

/// Marks the thread as working on a task, so that nested calls stay on it.
struct InsideTask {
  bool before = inside_task;
  InsideTask() { inside_task = true; }
  ~InsideTask() { inside_task = before; }
};

void work(Job& job, int worker, bool is_caller) {
  InsideTask mark;
  FlushToZero flush;
  auto checked = Clock::now();
  try {
    while (!job.stop.load(std::memory_order_relaxed)) {
      const int64_t task = job.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= job.tasks) return;
      job.fn(job.context, task, worker);
      if (!is_caller) continue;
      if (auto check = interrupt_check.load(std::memory_order_relaxed)) {
        const auto now = Clock::now();
        if (now - checked > std::chrono::milliseconds(50)) {
          checked = now;
          check();
        }
      }
    }
  } catch (...) {
    job.fail();
  }
}

/// Workers that wait for jobs. After one they spin for a moment, because an operation runs several phases one right
/// after the other, and then sleep on a condition variable; the moment is short, so that a worker never holds a core
/// that others want. A worker that wakes too late finds the job closed and is not waited for.
class Crew {
 public:
  /// The caller works too.
  void run(Job& job, int workers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      seats_ = workers - 1;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(job, 0, true);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
    }
    for (int spin = 0; spin < kSpins && active_.load(std::memory_order_acquire) != 0; ++spin) relax();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return active_.load(std::memory_order_relaxed) == 0; });
  }

  /// What a worker does until the crew is dismissed.
  void serve() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++spin) relax();
      Job* job = nullptr;
      int worker = 0;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return epoch_.load(std::memory_order_relaxed) != seen; });
        seen = epoch_.load(std::memory_order_relaxed);
        if (dismissed_) return;
        if (job_ == nullptr || seats_ == 0) continue;
        job = job_;
        worker = seats_--;
        active_.fetch_add(1, std::memory_order_relaxed);
      }
      work(*job, worker, false);
      std::lock_guard<std::mutex> lock(mutex_);
      if (active_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
    }
  }

  void dismiss() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      dismissed_ = true;
      epoch_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
  }

 private:
  static constexpr int kSpins = 4000;

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int seats_ = 0;
  bool dismissed_ = false;
  std::atomic<int> active_{0};
  std::atomic<uint64_t> epoch_{0};
};

/// A crew of threads of our own, as many as were ever asked for.
class Pool {
 public:
  void run(Job& job, int workers) {
    for (; started_ < workers - 1; ++started_) std::thread([this] { crew_.serve(); }).detach();
    crew_.run(job, workers);
  }

 private:
  Crew crew_;
  int started_ = 0;
};

template <class F>
F global_symbol(const char* name) {
  return reinterpret_cast<F>(dlsym(RTLD_DEFAULT, name));
}

/// The OpenMP runtime that the process shows to all its libraries, as torch shows its own; we link none.
struct OpenMP {
  void (*start)(void (*)(void*), void*, unsigned) = nullptr;
  void (*end)() = nullptr;
  int (*max_threads)() = nullptr;

  /// Looked for until it is there: torch may be imported after us.
  bool find() {
    if (threads_lost_) return false;
    if (max_threads != nullptr) return true;
    start = global_symbol<decltype(start)>(kStart);
    end = global_symbol<decltype(end)>("GOMP_parallel_end");
    if (start && end && global_symbol<Pause>(kPause))
      max_threads = global_symbol<decltype(max_threads)>("omp_get_max_threads");
    return max_threads != nullptr;
  }

  /// A child of fork has none of the threads, and would wait for them for ever in an operation of ours or of torch; so
  /// they end before the fork, and the next operation starts others, here and in the child.
  void before_fork() const {
    constexpr int kSoft = 1;
    // Looked for here, because another thread may be in find().
    const auto pause = threads_lost_ ? nullptr : global_symbol<Pause>(kPause);
    if (pause) pause(kSoft);
  }

 private:
  using Pause = int (*)(int);
  static constexpr char kStart[] = "GOMP_parallel_start", kPause[] = "omp_pause_resource_all";

  /// Whether this process was forked, and from one where it may have had threads already, before we were loaded.
  static bool threads_lost() {
    if (global_symbol<void*>(kStart) == nullptr) return false;
    std::ifstream file("/proc/self/stat");
    std::string stat, skipped;
    std::getline(file, stat, '\0');
    // "pid (name) state", five numbers and the flags of the process.
    std::istringstream fields(stat.substr(stat.rfind(')') + 1));
    for (int field = 0; field < 6; ++field) fields >> skipped;
    constexpr unsigned long kForkedNoExec = 0x40;
    unsigned long flags = 0;
    fields >> flags;
    return (flags & kForkedNoExec) != 0;
  }

  const bool threads_lost_ = threads_lost();
};

OpenMP openmp;
thread_local Crew* standing_by = nullptr;

// Never destroyed: its threads are detached and may outlive static destructors. A forked child has no threads but the
// caller, so it gets a fresh pool and a fresh lock.
Pool* pool = nullptr;
std::mutex* pool_mutex = nullptr;

void fresh_pool() {
  pool = new Pool;
  pool_mutex = new std::mutex;
}

const bool registered = [] {
  fresh_pool();
  pthread_atfork([] { openmp.before_fork(); }, nullptr,
                 [] {
                   fresh_pool();
                   inside_task = false;
                 });
  return true;
}();

}  // namespace

int worker_count(int64_t tasks, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({tasks, threads, kMaxThreads})));
}

void run_tasks(int64_t tasks, int threads, void (*fn)(void*, int64_t, int), void* context) {
  if (tasks <= 0) return;
  Job job;
  job.tasks = tasks;
  job.fn = fn;
  job.context = context;
  const int workers = worker_count(tasks, threads);
  std::unique_lock<std::mutex> lock(*pool_mutex, std::defer_lock);
  const bool alone = workers == 1 || inside_task;
  if (!alone && standing_by) {
    standing_by->run(job, workers);
  } else if (!alone && lock.try_lock()) {
    pool->run(job, workers);
  } else {
    work(job, 0, !inside_task);
  }
  if (job.error) std::rethrow_exception(job.error);
}

struct StandBy::Region {
  std::unique_lock<std::mutex> lock;
  const int workers;
  Crew crew;
  std::atomic<int> seats{1};

  static void enter(void* self) {
    auto& region = *static_cast<Region*>(self);
    if (region.seats.fetch_add(1, std::memory_order_relaxed) < region.workers) region.crew.serve();
  }
};

StandBy::StandBy(int threads) {
  if (threads < 2 || inside_task || standing_by) return;
  std::unique_lock<std::mutex> lock(*pool_mutex, std::try_to_lock);
  if (!lock || !openmp.find() || openmp.max_threads() < threads) return;
  region_.reset(new Region{std::move(lock), threads, {}});
  standing_by = &region_->crew;
  // As many as in torch's operations: another number would end threads of the team and start them again.
  openmp.start(&Region::enter, region_.get(), static_cast<unsigned>(openmp.max_threads()));
}

StandBy::~StandBy() {
  if (!region_) return;
  standing_by = nullptr;
  region_->crew.dismiss();
  openmp.end();
}

void set_interrupt_check(void (*check)()) { interrupt_check.store(check); }

namespace {

/// Blocks of up to 1 MiB that a thread has released, by size class. malloc would give them back to the system after
/// every call and fault them in again at the next: a third of the time of a loss of 256 x 128.
class Cache {
 public:
  static constexpr int kClasses = 15;  // 64 bytes << class
  static constexpr size_t kMost = size_t(4) << 20;

  ~Cache() {
    for (auto& blocks : blocks_)
      for (void* block : blocks) std::free(block);
  }
  void* take(int size_class) {
    auto& blocks = blocks_[size_class];
    if (blocks.empty()) return nullptr;
    void* block = blocks.back();
    blocks.pop_back();
    held_ -= size_t(64) << size_class;
    return block;
  }
  bool put(int size_class, void* block) noexcept {
    const size_t size = size_t(64) << size_class;
    if (held_ + size > kMost) return false;
    try {
      blocks_[size_class].push_back(block);
    } catch (...) {
      return false;
    }
    held_ += size;
    return true;
  }

 private:
  std::vector<void*> blocks_[kClasses];
  size_t held_ = 0;
};

thread_local Cache cache;

/// The class of a size, or kClasses where it is too large to be kept.
int class_of(size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  return Cache::kClasses;  // the sanitizer is to see every block, and where it ends
#endif
  int size_class = 0;
  while (size_class < Cache::kClasses && (size_t(64) << size_class) < bytes) ++size_class;
  return size_class;
}

}  // namespace

void* workspace_acquire(size_t bytes) {
  const int size_class = class_of(bytes);
  const bool kept = size_class < Cache::kClasses;
  if (kept)
    if (void* block = cache.take(size_class)) return block;
  void* pointer = nullptr;
  if (posix_memalign(&pointer, 64, kept ? size_t(64) << size_class : bytes) != 0) throw std::bad_alloc();
  return pointer;
}

void workspace_release(void* pointer, size_t bytes) noexcept {
  if (pointer == nullptr) return;
  const int size_class = class_of(bytes);
  if (size_class == Cache::kClasses || !cache.put(size_class, pointer)) std::free(pointer);
}

void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
#if defined(MADV_HUGEPAGE)
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)begin, (void)end;
#endif
}

int available_cpus() {
  int cpus = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) cpus = CPU_COUNT(&set);
  // cgroup v2 "max 100000" or "200000 100000", then v1 in two files.
  double quota = 0, period = 0;
  std::string word;
  if (std::ifstream file("/sys/fs/cgroup/cpu.max"); file >> word >> period && word != "max")
    quota = std::atof(word.c_str());
  if (quota <= 0) {
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") >> quota;
    std::ifstream("/sys/fs/cgroup/cpu/cpu.cfs_period_us") >> period;
  }
  if (quota > 0 && period > 0) cpus = std::min(cpus, static_cast<int>(quota / period + 0.999));
#endif
  return std::max(1, cpus);
}

}  // namespace nearfar
