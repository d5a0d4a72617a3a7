// Runs numbered tasks on XLA's thread pool and on the calling thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

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

// Threads of the pool that stay awake for a moment after some work: the next comes within microseconds while a model
// runs, and waking a thread takes longer than many a product. Then they go back to the pool, and sleep.
class Helpers {
 public:
  using Work = std::function<bool()>;  // returns whether there was something left to do

  // Has `work` done by `count` threads at most; by fewer, or by none, if they are busy elsewhere.
  void call(xla::ffi::ThreadPool& pool, int64_t count, const Work& work) {
    const int64_t awake = std::min<int64_t>(count, awake_.load(std::memory_order_relaxed));
    if (awake > 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      waiting_.assign(awake, work);  // in place of what nobody came for: who asked does all of it
      num_waiting_.store(awake, std::memory_order_release);
    }
    for (int64_t i = awake; i < count; ++i) pool.Schedule([this, work] { stay(work); });
  }

 private:
  void stay(Work work) {
    while (work && work()) work = next();
  }

  Work next() {
    constexpr auto kAwake = std::chrono::microseconds(100);
    const auto since = std::chrono::steady_clock::now();
    awake_.fetch_add(1);
    Work found;
    do {
      for (int i = 0; i < 64 && num_waiting_.load(std::memory_order_acquire) == 0; ++i) relax();
      if (num_waiting_.load(std::memory_order_acquire) > 0) found = take();
    } while (!found && std::chrono::steady_clock::now() - since < kAwake);
    awake_.fetch_sub(1);
    return found;
  }

  Work take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (waiting_.empty()) return nullptr;
    Work work = std::move(waiting_.back());
    waiting_.pop_back();
    num_waiting_.store(static_cast<int64_t>(waiting_.size()), std::memory_order_release);
    return work;
  }

  std::atomic<int64_t> awake_{0}, num_waiting_{0};
  std::mutex mutex_;
  std::vector<Work> waiting_;
};

inline Helpers& helpers() {
  static Helpers* const all = new Helpers;  // never destroyed: threads may look at it until the process has ended
  return *all;
}

// Calls f(i) for i in [0, count), in any order and from several threads, and returns when all are done.
// The caller takes tasks as well, so a pool that is busy, or is the caller's own, cannot hold it up for ever.
template <class F>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const F& f) {
  const int64_t wanted = std::min<int64_t>(pool.num_threads() - 1, count - 1);
  if (wanted <= 0) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  const F* body = &f;
  auto work = [state, body, count]() noexcept {  // a task that throws would leave the others without their body
    bool worked = false;
    for (int64_t i; (i = state->next.fetch_add(1)) < count; worked = true) {
      (*body)(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
    return worked;
  };
  helpers().call(pool, wanted, work);
  work();
  for (int64_t turn = 1; state->done.load(std::memory_order_acquire) < count; ++turn) {
    relax();
    if (turn % 4096 == 0) std::this_thread::yield();  // whoever has the task may be waiting for this core
  }
}

}  // namespace mla
