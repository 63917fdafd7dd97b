// The parts of an operation on XLA's own threads, which the process has anyway, and which are awake during a step.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace moe {

class Pool {
 public:
  explicit Pool(xla::ffi::ThreadPool threads) : threads_(threads) {}

  // f(i) for each i < count, in any order, on any threads. Returns when all are done. Whatever no other thread has
  // begun, the caller does, so it does not matter whether there are others and when they come.
  template <class F>
  void run(int64_t count, const F& f) {
    const int64_t helpers = std::min<int64_t>(count, threads_.num_threads()) - 1;
    if (helpers < 1) {
      for (int64_t i = 0; i < count; ++i) f(i);
      return;
    }
    struct Shared {  // who comes late finds no part left, and f gone
      std::atomic<int64_t> next{0}, done{0};
    };
    auto shared = std::make_shared<Shared>();
    const auto work = [shared, count, f = &f] {
      int64_t mine = 0;
      for (int64_t i = shared->next.fetch_add(1); i < count; i = shared->next.fetch_add(1), ++mine) (*f)(i);
      if (mine > 0) shared->done.fetch_add(mine, std::memory_order_release);
    };
    for (int64_t i = 0; i < helpers; ++i) threads_.Schedule([work] { work(); });
    work();
    for (int spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins)
      if (spins > 2000) std::this_thread::yield();
  }

 private:
  xla::ffi::ThreadPool threads_;
};

}  // namespace moe
