#include "emulation/memory.h"

#include <algorithm>

#include "emulation/grid.h"
#include "emulation/races.h"

namespace emulation {

namespace {

void check_aligned(const char* what, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) fail("%s at %p, which is no multiple of %zu", what, address, bytes);
}

// The bytes of a copy that has arrived.
void finish_copy(const Copy& copy, const void* where) {
  races::finish_copy(copy.to, copy.from, static_cast<size_t>(copy.bytes), where);
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
  std::memset(copy.to + copy.bytes, 0, static_cast<size_t>(16 - copy.bytes));
}

void finish_copies(Thread& thread, size_t count, const void* where) {
  for (size_t i = 0; i < count; ++i) finish_copy(thread.copies[i], where);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(count));
}

}  // namespace

unsigned char* shared_memory() { return running("shared_memory").block->shared.data(); }

void copy_async_16(void* to_shared, const void* from, int bytes) {
  Thread& thread = running("copy_async_16");
  if (bytes < 0 || bytes > 16) fail("copies %d bytes asynchronously: expected 0 to 16", bytes);
  check_aligned("copies asynchronously to shared memory", to_shared, 16);
  check_aligned("copies asynchronously from global memory", from, 16);
  const SharedBlock& shared = thread.block->shared;
  if (!shared.contains(to_shared, 16)) {
    const auto offset = static_cast<unsigned char*>(to_shared) - shared.data();
    fail("copies asynchronously to byte %td of its %zu bytes of shared memory", offset, shared.size());
  }
  if (shared.near(from)) fail("copies asynchronously from shared memory: expected global memory");
  const Copy copy{static_cast<unsigned char*>(to_shared), static_cast<const unsigned char*>(from), bytes};
  races::start_copy(to_shared, from, static_cast<size_t>(bytes), __builtin_return_address(0));
  // The bytes may come at any time from here to the wait. Late shows a wait that is missing, and early, at times, a
  // target that others still read; nobody may read it in between, so it can be NaN meanwhile.
  Grid& grid = *thread.block->grid;
  if (grid.order.kind == Order::random && grid.random.below(4) == 0) {
    std::memcpy(copy.to, copy.from, static_cast<size_t>(bytes));
    std::memset(copy.to + bytes, 0, static_cast<size_t>(16 - bytes));
  } else {
    std::memset(to_shared, 0xff, 16);
  }
  thread.copies.push_back(copy);
}

void copy_async_commit() {
  Thread& thread = running("copy_async_commit");
  size_t grouped = 0;
  for (size_t group : thread.committed) grouped += group;
  thread.committed.push_back(thread.copies.size() - grouped);
}

void copy_async_wait(int pending) {
  Thread& thread = running("copy_async_wait");
  if (pending < 0) fail("waits for %d pending groups of copies", pending);
  const auto keep = static_cast<size_t>(pending);
  if (thread.committed.size() <= keep) return;
  const size_t groups = thread.committed.size() - keep;
  size_t count = 0;
  for (size_t i = 0; i < groups; ++i) count += thread.committed[i];
  thread.committed.erase(thread.committed.begin(), thread.committed.begin() + static_cast<ptrdiff_t>(groups));
  finish_copies(thread, count, __builtin_return_address(0));
}

}  // namespace emulation
