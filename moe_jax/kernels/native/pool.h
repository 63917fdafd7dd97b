// The threads of one process that help with an operation's parts.
//
// Operations here take tens of microseconds, less than a sleeping thread takes to wake, so helpers look for the next
// one for a while before they sleep. Who finds them busy (another rank of the process) does all its parts itself.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe {

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;  // never destroyed: threads may outlive main
    return *pool;
  }

  // How many threads work on an operation, the caller's included. More are never ended, only left asleep.
  void set_threads(int n) {
    std::lock_guard<std::mutex> lock(mutex_);
    helpers_ = n > 1 ? n - 1 : 0;
    for (; started_ < helpers_; ++started_) std::thread([this, i = started_] { help(i); }).detach();
  }

  // f(i) for each i < count, in any order, on any threads. Returns when all are done.
  template <class F>
  void run(int64_t count, const F& f) {
    if (count < 2 || helpers_.load(std::memory_order_relaxed) == 0 || busy_.exchange(true, std::memory_order_acquire)) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    call_ = [](const void* f, int64_t i) { (*static_cast<const F*>(f))(i); };
    f_ = &f, count_ = count;
    next_.store(0);
    inside_.store(1);
    number_.fetch_add(1);
    if (asleep_.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    work();
    // From 0 on nobody comes in.
    int seen = inside_.fetch_sub(1) - 1;
    for (int spins = 0; seen != 0; ++spins, seen = inside_.load()) spins < kSpins ? pause() : std::this_thread::yield();
    busy_.store(false, std::memory_order_release);
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  void work() {
    for (int64_t i = next_.fetch_add(1); i < count_; i = next_.fetch_add(1)) call_(f_, i);
  }

  void help(int index) {
    uint64_t done = 0;
    for (;;) {
      for (int spins = 0; number_.load(std::memory_order_acquire) == done || index >= helpers_.load(); ++spins) {
        if (spins < kSpins) {
          pause();
          if (spins % 64 == 63) std::this_thread::yield();
          continue;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        asleep_.fetch_add(1);
        wake_.wait(lock, [&] { return number_.load() != done && index < helpers_.load(); });
        asleep_.fetch_sub(1);
        spins = 0;
      }
      done = number_.load(std::memory_order_acquire);
      for (int seen = inside_.load(); seen > 0;) {
        if (inside_.compare_exchange_weak(seen, seen + 1)) {
          work();
          inside_.fetch_sub(1);
          break;
        }
      }
    }
  }

  static constexpr int kSpins = 4000;  // some 200 us

  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<int> helpers_{0}, asleep_{0};
  int started_ = 0;
  std::atomic<bool> busy_{false};  // from here on: the operation in progress
  std::atomic<uint64_t> number_{0};
  std::atomic<int> inside_{0};
  std::atomic<int64_t> next_{0};
  void (*call_)(const void*, int64_t) = nullptr;
  const void* f_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace moe
