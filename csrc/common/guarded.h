// What every entry point of the C interface does around its work.
#pragma once

#include <algorithm>
#include <exception>
#include <new>

#include "common/status.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace specprefill {

// Arithmetic with subnormal numbers, whatever the caller's thread is set to (torch.set_flush_denormal): a result must
// not depend on the thread that computed it, and narrow dtypes are decoded through subnormals.
class DefaultFloatingPoint {
 public:
#if defined(__SSE__)
  DefaultFloatingPoint() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~kFlushBits); }
  ~DefaultFloatingPoint() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlushBits = 0x8040;  // flush to zero, denormals are zero
  unsigned before_;
#elif defined(__aarch64__)
  DefaultFloatingPoint() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ & ~kFlushBit));
  }
  ~DefaultFloatingPoint() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  static constexpr uint64_t kFlushBit = uint64_t{1} << 24;
  uint64_t before_;
#endif
};

// More threads than this are not started, whatever the caller asks for.
constexpr int kMaxThreads = 256;
inline int clamp_threads(int num_threads) { return std::min(std::max(num_threads, 1), kMaxThreads); }

// Sizes beyond this do not fit the int32 positions of a selection.
constexpr int64_t kMaxSize = INT32_MAX;

// Runs `body`, which returns a status; no exception leaves the C interface.
template <class F>
int guarded(const char* name, F&& body) {
  const DefaultFloatingPoint floating_point;
  (void)floating_point;
  clear_error();
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(SPECPREFILL_OUT_OF_MEMORY, "%s: out of memory", name);
  } catch (const std::exception& error) {  // std::length_error: a size that no memory could hold
    return fail(SPECPREFILL_OUT_OF_MEMORY, "%s: out of memory (%s)", name, error.what());
  }
}

}  // namespace specprefill
