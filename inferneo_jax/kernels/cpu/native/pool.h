// Work shared out over XLA's own thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace {

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Calls work(i) once for each i below `chunks`, on this thread and on those of the pool that are
// free; returns when all are done. Which thread gets which chunk is left to chance, so no result
// may depend on it.
//
// The calling thread takes chunks too and never waits for a helper that has not begun: a pool
// whose threads are all busy (or all waiting in here) costs time, and cannot deadlock.
template <typename Work>
void share(xla::ffi::ThreadPool& pool, int64_t chunks, Work&& work) {
  const int64_t helpers = std::min(pool.num_threads(), chunks) - 1;
  if (helpers < 1) {
    for (int64_t i = 0; i < chunks; ++i) work(i);
    return;
  }
  // On the heap and counted: a helper may begin after the last chunk was done and this call over.
  struct Shared {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto take = [shared, chunks, &work] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < chunks;) {
      work(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(decltype(take)(take));
  take();
  // What is left is at most a chunk a helper: some microseconds, unless its core was taken away.
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < chunks; ++spins) {
    if (spins < 4096) {
      relax();
    } else {
      std::this_thread::yield();
    }
  }
}

}  // namespace
