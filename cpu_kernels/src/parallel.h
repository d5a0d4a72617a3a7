// Runs numbered tasks on XLA's thread pool and on the calling thread.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

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

// The tasks of a call, which threads take one by one. What they look at lies in one line of the processor's caches: to
// pass a line from core to core takes about as long as a small task.
struct alignas(64) Tasks {
  using Run = void (*)(const void* body, int64_t task);

  std::atomic<uint64_t> left{0};  // how many nobody has taken, and in the upper half the number of the call
  std::atomic<int64_t> count{0};
  std::atomic<Run> run{nullptr};
  std::atomic<const void*> body{nullptr};
  alignas(64) std::atomic<int64_t> unfinished{0};
  std::atomic<bool> in_use{false};

  // Offers `number` tasks, fewer than 2 ** 32. Those of the call before have all ended.
  void offer(int64_t number, Run how, const void* with) {
    count.store(number, std::memory_order_relaxed);
    run.store(how, std::memory_order_relaxed);
    body.store(with, std::memory_order_relaxed);
    unfinished.store(number, std::memory_order_relaxed);
    const uint64_t call = (left.load(std::memory_order_relaxed) >> 32) + 1;
    left.store(call << 32 | static_cast<uint32_t>(number));
  }

  // Does tasks until all are taken, and returns whether there were any.
  bool work() {
    uint64_t seen = left.load();
    const uint64_t call = seen >> 32;
    const int64_t all = count.load(std::memory_order_relaxed);  // of that call, if one of its tasks can still be taken
    const Run how = run.load(std::memory_order_relaxed);
    const void* const with = body.load(std::memory_order_relaxed);
    int64_t ended = 0;
    while (seen >> 32 == call && static_cast<uint32_t>(seen) > 0)
      if (left.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        how(with, all - static_cast<uint32_t>(seen));
        ++ended;
        seen = left.load(std::memory_order_acquire);
      }
    if (ended > 0) unfinished.fetch_sub(ended, std::memory_order_release);
    return ended > 0;
  }
};

// Threads of the pool that stay awake for a moment after some work: the next comes within microseconds while a model
// runs, and waking a thread takes longer than many a product. Then they go back to the pool, and sleep.
class Helpers {
 public:
  // Does `count` tasks on this thread, and on others that are awake or can be woken: up to `most`, the pool's but one.
  void call(xla::ffi::ThreadPool& pool, int64_t most, int64_t count, Tasks::Run run, const void* body) {
    Tasks* const tasks = claim();
    if (tasks == nullptr) {
      for (int64_t i = 0; i < count; ++i) run(body, i);
      return;
    }
    tasks->offer(count, run, body);
    const int64_t others = std::min(most, count - 1), wanted = std::min(wanted_.fetch_add(others) + others, most);
    for (int64_t i = awake_.load(); i < wanted; ++i) pool.Schedule([this, most] { stay(most); });
    tasks->work();
    for (int64_t turn = 1; tasks->unfinished.load(std::memory_order_acquire) > 0; ++turn) {
      relax();
      if (turn % 4096 == 0) std::this_thread::yield();  // whoever has the task may be waiting for this core
    }
    wanted_.fetch_sub(others);
    tasks->in_use.store(false, std::memory_order_release);
  }

 private:
  // Returns what no call uses; null where as many calls as there is room for go on at once.
  Tasks* claim() {
    for (Tasks& tasks : calls_)
      if (!tasks.in_use.exchange(true, std::memory_order_acquire)) return &tasks;
    return nullptr;
  }

  // Helps whatever calls there are, until there has been nothing to do for a while; not if `most` threads do already.
  void stay(int64_t most) {
    using Clock = std::chrono::steady_clock;
    constexpr auto kAwake = std::chrono::microseconds(100);
    if (awake_.fetch_add(1) < most) {
      auto since = Clock::now();
      do {
        bool worked = false;
        for (int i = 0; i < 64; ++i, relax()) worked |= help();
        if (worked) since = Clock::now();
      } while (Clock::now() - since < kAwake);
    }
    awake_.fetch_sub(1);
    help();  // a call that began meanwhile may have counted on this thread
  }

  bool help() {
    bool worked = false;
    for (Tasks& tasks : calls_) worked |= tasks.work();
    return worked;
  }

  std::array<Tasks, 16> calls_;  // that go on at once
  alignas(64) std::atomic<int64_t> wanted_{0};  // threads, by all calls that go on
  alignas(64) std::atomic<int64_t> awake_{0};
};

inline Helpers& helpers() {
  static Helpers* const all = new Helpers;  // never destroyed: threads may look at it until the process has ended
  return *all;
}

// Calls f(i) for i in [0, count), in any order and from several threads, and returns when all are done. No task may
// throw. The caller takes tasks as well, so a pool that is busy, or is the caller's own, cannot hold it up for ever.
template <class F>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const F& f) {
  const int64_t most = pool.num_threads() - 1;
  const auto run = [](const void* body, int64_t i) noexcept { (*static_cast<const F*>(body))(i); };
  if (most > 0 && count > 1) return helpers().call(pool, most, count, run, &f);
  for (int64_t i = 0; i < count; ++i) f(i);
}

// Calls f(begin, end) for ranges of `step` and a last one of what is left, [0, count) together, as `parallel_for` does.
template <class F>
void parallel_ranges(xla::ffi::ThreadPool& pool, int64_t count, int64_t step, const F& f) {
  parallel_for(pool, (count + step - 1) / step, [&](int64_t i) { f(i * step, std::min(count, (i + 1) * step)); });
}

// Returns how many things of `size` numbers each a task takes that is to have about `numbers`.
inline int64_t step_of(int64_t numbers, int64_t size) {
  return std::max<int64_t>(1, numbers / std::max<int64_t>(1, size));
}

}  // namespace mla
