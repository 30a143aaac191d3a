#include "emulation/shared_block.h"

#include <cstdint>
#include <cstring>

#include "emulation/fiber.h"

#if defined(SPECPREFILL_ASAN)
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {

namespace {

constexpr unsigned char kCanary = 0xc5;

}  // namespace

SharedBlock::~SharedBlock() { protect(false); }

// AddressSanitizer then reports the very access. It knows 8 bytes at a time; the canary sees the rest.
void SharedBlock::protect(bool on) {
#if defined(SPECPREFILL_ASAN)
  if (!memory_) return;
  if (!on) return __asan_unpoison_memory_region(memory_.get(), capacity_);
  __asan_poison_memory_region(data_ - kGuard, kGuard);
  const size_t used = (size_ + 7) / 8 * 8;
  __asan_poison_memory_region(data_ + used, kGuard - (used - size_));
#else
  (void)on;
#endif
}

void SharedBlock::start(size_t bytes) {
  protect(false);
  const size_t needed = bytes + 2 * kGuard + 1024 + 16;
  if (needed > capacity_) {
    memory_.reset(new unsigned char[needed]);
    capacity_ = needed;
  }
  // A multiple of 16 and of no more: what needs more than CUDA promises does not get it here.
  const auto first = reinterpret_cast<uintptr_t>(memory_.get()) + kGuard;
  data_ = memory_.get() + kGuard + (1024 - first % 1024) % 1024 + 16;
  size_ = bytes;
  std::memset(data_ - kGuard, kCanary, kGuard);
  std::memset(data_, 0xff, size_);
  std::memset(data_ + size_, kCanary, kGuard);
  protect(true);
}

bool SharedBlock::finish(ptrdiff_t* written) {
  protect(false);
  for (size_t i = 0; i < kGuard; ++i) {
    *written = static_cast<ptrdiff_t>(size_ + i);
    if (data_[*written] != kCanary) return false;
    *written = -static_cast<ptrdiff_t>(i) - 1;
    if (data_[*written] != kCanary) return false;
  }
  return true;
}

}  // namespace emulation
