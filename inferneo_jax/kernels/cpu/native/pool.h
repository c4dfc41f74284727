// Shares work out over threads.
//
// XLA's own pool sleeps between calls, and a step makes a hundred short ones: waking it took about
// as long as a call of few rows. So the kernels have worker threads of their own, which spin for a
// while before they sleep. They serve one call at a time; a concurrent call, of a second model, does
// its own work with the help of XLA's pool.
//
// Not in an anonymous namespace: all sources share one set of workers.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace inferneo {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until ready(), for as long as a sleeping thread takes to wake, some 50 us. Returns ready().
template <typename Ready>
bool look_out(const Ready& ready) {
  constexpr int kSpins = 2000;
  for (int spins = 0; spins < kSpins; ++spins) {
    if (ready()) return true;
    relax();
  }
  return false;
}

// Chunks of one call; each thread that is free takes the next.
struct Chunks {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  int64_t count;
  void (*call)(const void* work, int64_t i);
  const void* work;

  void take() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      call(work, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }

  // At most a chunk of each helper is left: some microseconds, unless the helper lost its core.
  void wait() const {
    const auto all = [this] { return done.load(std::memory_order_acquire) >= count; };
    while (!look_out(all)) std::this_thread::yield();
  }
};

// Threads that live as long as the process.
class Workers {
 public:
  static Workers& of_process(int64_t count) {
    static Workers* const workers = new Workers(count);  // never deleted, as its threads never end
    return *workers;
  }

  // Runs all chunks with the workers' help; false if they are busy with another call.
  bool run(const std::shared_ptr<Chunks>& chunks) {
    std::unique_lock<std::mutex> mine(owner_, std::try_to_lock);
    if (!mine) return false;
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      current_ = chunks;
      number_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load(std::memory_order_seq_cst)) wake_.notify_all();
    chunks->take();
    chunks->wait();
    return true;
  }

 private:
  explicit Workers(int64_t count) {
    for (int64_t i = 0; i < count; ++i) std::thread(&Workers::work, this).detach();
  }

  void work() {
    for (uint64_t seen = 0;;) {
      const auto called = [&] { return number_.load(std::memory_order_acquire) != seen; };
      look_out(called);
      std::shared_ptr<Chunks> chunks;
      {
        std::unique_lock<std::mutex> guard(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(guard, called);
        sleeping_.fetch_sub(1, std::memory_order_relaxed);
        seen = number_.load(std::memory_order_relaxed);
        chunks = current_;
      }
      chunks->take();
    }
  }

  std::mutex owner_;  // held by the call that the workers serve
  std::mutex mutex_;  // of the members below
  std::condition_variable wake_;
  std::shared_ptr<Chunks> current_;
  std::atomic<uint64_t> number_{0};
  std::atomic<int> sleeping_{0};
};

// Calls work(i) once for each i below `chunks`, on this thread and on others that are free, and
// returns when all are done. No result may depend on which thread gets which chunk.
//
// The calling thread takes chunks too and never waits for a helper that has not begun, so busy
// threads cost time but cannot deadlock.
template <typename Work>
void share(xla::ffi::ThreadPool& pool, int64_t chunks, const Work& work) {
  const int64_t threads = pool.num_threads();
  if (std::min(threads, chunks) < 2) {
    for (int64_t i = 0; i < chunks; ++i) work(i);
    return;
  }
  // Reference-counted: a helper may begin after the last chunk, when this call has returned.
  const auto shared = std::make_shared<Chunks>();
  shared->count = chunks;
  shared->work = &work;
  shared->call = [](const void* each, int64_t i) { (*static_cast<const Work*>(each))(i); };
  if (Workers::of_process(threads - 1).run(shared)) return;
  for (int64_t i = 1; i < std::min(threads, chunks); ++i) {
    pool.Schedule([shared] { shared->take(); });
  }
  shared->take();
  shared->wait();
}

}  // namespace inferneo
