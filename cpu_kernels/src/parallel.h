// Runs numbered tasks on XLA's thread pool and on the calling thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace mla {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Calls f(i) for i in [0, count), in any order and from several threads, and returns when all are done.
// The caller takes tasks as well, so a pool that is busy, or is the caller's own, cannot hold it up for ever.
template <class F>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const F& f) {
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, count - 1);
  if (helpers <= 0) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  const F* body = &f;
  auto work = [state, body, count] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      (*body)(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  while (state->done.load(std::memory_order_acquire) < count) relax();
}

}  // namespace mla
