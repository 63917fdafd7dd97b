// A gate in a program: what lies behind it is handed to the device only while the process keeps it open, and only when
// what lies a number of gates back is done.
#include <dlfcn.h>
#include <time.h>

#include <array>
#include <atomic>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kEvents = 64;         // the most that a device can be ahead
constexpr long kLookEvery = 20000;  // nanoseconds; what is waited for takes longer
constexpr int kNotReady = 600;      // CUDA_ERROR_NOT_READY

std::atomic<bool> closed{false};
std::atomic<int> ahead{kEvents};

ffi::Error shut() { return ffi::Error(ffi::ErrorCode::kAborted, "the rest of this program is not wanted any more"); }

ffi::Error check(ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  if (closed.load(std::memory_order_relaxed)) return shut();
  if (x.untyped_data() != y->untyped_data()) return ffi::Error::Internal("gate: found a copy, expected one buffer");
  return ffi::Error::Success();
}

// The driver's functions, found where the process has loaded it: building takes no CUDA.
struct Driver {
  int (*create)(void** event, unsigned flags) = nullptr;
  int (*record)(void* event, void* stream) = nullptr;
  int (*query)(void* event) = nullptr;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) return;
    create = reinterpret_cast<decltype(create)>(dlsym(library, "cuEventCreate"));
    record = reinterpret_cast<decltype(record)>(dlsym(library, "cuEventRecord"));
    query = reinterpret_cast<decltype(query)>(dlsym(library, "cuEventQuery"));
  }
};

// One device a process, and one thread that hands over.
ffi::Error pass_on_device(void* stream, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y) {
  static const Driver driver;
  static std::array<void*, kEvents> events{};
  static unsigned long passed = 0;
  if (ffi::Error error = check(x, y); error.failure()) return error;
  if (driver.query == nullptr) return ffi::Error::Internal("gate: found no CUDA driver in this process");
  constexpr unsigned kDisableTiming = 2;
  void*& here = events[passed % kEvents];
  if (here == nullptr && driver.create(&here, kDisableTiming) != 0) return ffi::Error::Internal("gate: no event");
  if (driver.record(here, stream) != 0) return ffi::Error::Internal("gate: the event cannot be recorded");
  const unsigned long number = passed++, back = ahead.load(std::memory_order_relaxed);
  if (back >= kEvents || back > number) return ffi::Error::Success();
  void* waited_for = events[(number - back) % kEvents];
  while (driver.query(waited_for) == kNotReady) {  // any other error comes up in XLA
    if (closed.load(std::memory_order_relaxed)) return shut();
    const timespec pause{0, kLookEvery};
    nanosleep(&pause, nullptr);
  }
  return ffi::Error::Success();
}

}  // namespace

extern "C" void moe_jax_close_gates(bool close) { closed.store(close, std::memory_order_relaxed); }
extern "C" void moe_jax_set_ahead(int number) { ahead.store(number, std::memory_order_relaxed); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(moe_jax_gate_cpu, check, ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moe_jax_gate_cuda, pass_on_device,
    ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
