// Fibers: threads of execution that give way to each other by name, all on one OS thread.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define SPECPREFILL_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SPECPREFILL_ASAN 1
#endif
#endif

namespace emulation {

// Where to go on. The scheduler's own has no stack of its own: it lives on the OS thread's.
struct Fiber {
  void* context = nullptr;  // a stack pointer, or a ucontext_t
  unsigned char* stack = nullptr;
  size_t stack_bytes = 0;
  void* shadow = nullptr;  // AddressSanitizer's
};

// `fiber` will run `entry`, which must not return, from the start.
void prepare(Fiber& fiber, void (*entry)());
// Leaves `from` and goes on with `to`. `ends`: nobody will come back to `from`.
void change(Fiber& from, Fiber& to, bool ends = false);
// The first thing that `entry` does, with the fiber it was changed from.
void arrived(Fiber& from);

// Memory for a stack, with a page in front that must not be touched; its end is a multiple of 64.
unsigned char* new_stack(size_t bytes);
void delete_stack(unsigned char* stack, size_t bytes);

}  // namespace emulation
