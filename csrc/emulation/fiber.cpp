#include "emulation/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

// SPECPREFILL_EMULATION_UCONTEXT chooses what other processors than x86-64 use there too, to test it.
#if !defined(__x86_64__) || defined(SPECPREFILL_EMULATION_UCONTEXT)
#define SPECPREFILL_UCONTEXT 1
#include <ucontext.h>
#endif
#if defined(SPECPREFILL_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#if !defined(SPECPREFILL_UCONTEXT)

// Keeps what the System V ABI lets a function rely on after a call: six registers, on the stack that is left. ucontext
// would do, but it makes two system calls per switch, and a test makes millions of switches.
extern "C" void specprefill_emulation_change(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden specprefill_emulation_change
.globl specprefill_emulation_change
.type specprefill_emulation_change,@function
specprefill_emulation_change:
  .cfi_startproc
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .cfi_endproc
.size specprefill_emulation_change,.-specprefill_emulation_change
)");

namespace {

void set_start(Fiber& fiber, void (*entry)()) {
  // At its first instruction a function finds its return address on the stack and rsp + 8 a multiple of 16.
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.stack_bytes);
  *--top = nullptr;                         // entry's return address: it has none
  *--top = reinterpret_cast<void*>(entry);  // where the switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.context = top;
}

void swap(Fiber& from, Fiber& to) { specprefill_emulation_change(&from.context, to.context); }

}  // namespace

#else

namespace {

ucontext_t& context(Fiber& fiber) {
  if (!fiber.context) fiber.context = new ucontext_t;
  return *static_cast<ucontext_t*>(fiber.context);
}

void set_start(Fiber& fiber, void (*entry)()) {
  ucontext_t& start = context(fiber);
  getcontext(&start);
  start.uc_stack.ss_sp = fiber.stack;
  start.uc_stack.ss_size = fiber.stack_bytes;
  start.uc_link = nullptr;
  makecontext(&start, entry, 0);
}

void swap(Fiber& from, Fiber& to) { swapcontext(&context(from), &context(to)); }

}  // namespace

#endif

void prepare(Fiber& fiber, void (*entry)()) {
#if defined(SPECPREFILL_ASAN)
  // A launch that failed left its functions' red zones behind.
  __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
#endif
  fiber.shadow = nullptr;
  set_start(fiber, entry);
}

void change(Fiber& from, Fiber& to, bool ends) {
#if defined(SPECPREFILL_ASAN)
  __sanitizer_start_switch_fiber(ends ? nullptr : &from.shadow, to.stack, to.stack_bytes);
#else
  (void)ends;
#endif
  swap(from, to);
#if defined(SPECPREFILL_ASAN)
  __sanitizer_finish_switch_fiber(from.shadow, nullptr, nullptr);
#endif
}

void arrived(Fiber& from) {
#if defined(SPECPREFILL_ASAN)
  const void* stack = nullptr;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &from.stack_bytes);
  from.stack = static_cast<unsigned char*>(const_cast<void*>(stack));
#else
  (void)from;
#endif
}

unsigned char* new_stack(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  return static_cast<unsigned char*>(memory) + page;
}

void delete_stack(unsigned char* stack, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(stack - page, bytes + page);
}

}  // namespace emulation
