// The functions that -fsanitize=thread makes the compiler call at every access to memory. ThreadSanitizer's library
// knows OS threads; these know the threads of a grid. Host code that calls them is not in a kernel, and nothing
// happens.
#include "emulation/races.h"

#if defined(SPECPREFILL_EMULATION_RACES)

using emulation::races::Atomic;

#define SPECPREFILL_WHERE __builtin_return_address(0)

// NOLINTBEGIN: the names are the compiler's.
#define SPECPREFILL_ACCESS(bytes)                                                                       \
  void __tsan_read##bytes(void* p) { emulation::races::read(p, bytes, SPECPREFILL_WHERE); }             \
  void __tsan_write##bytes(void* p) { emulation::races::write(p, bytes, SPECPREFILL_WHERE); }           \
  void __tsan_unaligned_read##bytes(void* p) { emulation::races::read(p, bytes, SPECPREFILL_WHERE); }   \
  void __tsan_unaligned_write##bytes(void* p) { emulation::races::write(p, bytes, SPECPREFILL_WHERE); } \
  void __tsan_volatile_read##bytes(void* p) {                                                           \
    emulation::races::atomic(p, bytes, Atomic::relaxed_load, SPECPREFILL_WHERE);                        \
  }                                                                                                     \
  void __tsan_volatile_write##bytes(void* p) {                                                          \
    emulation::races::atomic(p, bytes, Atomic::relaxed_store, SPECPREFILL_WHERE);                       \
  }                                                                                                     \
  void __tsan_unaligned_volatile_read##bytes(void* p) {                                                 \
    emulation::races::atomic(p, bytes, Atomic::relaxed_load, SPECPREFILL_WHERE);                        \
  }                                                                                                     \
  void __tsan_unaligned_volatile_write##bytes(void* p) {                                                \
    emulation::races::atomic(p, bytes, Atomic::relaxed_store, SPECPREFILL_WHERE);                       \
  }

// Orders are ignored: kernels use CUDA's atomics, which are the emulator's; host code gets the strongest.
#define SPECPREFILL_FETCH(bits, type, name)                                                          \
  type __tsan_atomic##bits##_fetch_##name(volatile type* p, type value, int) {                       \
    emulation::races::atomic(const_cast<type*>(p), sizeof(type), Atomic::update, SPECPREFILL_WHERE); \
    return __atomic_fetch_##name(p, value, __ATOMIC_SEQ_CST);                                        \
  }
#define SPECPREFILL_SWAP(bits, type, strength, weak)                                                              \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile type* p, type* expected, type value, int, int) { \
    emulation::races::atomic(const_cast<type*>(p), sizeof(type), Atomic::update, SPECPREFILL_WHERE);              \
    return __atomic_compare_exchange_n(p, expected, value, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);             \
  }
#define SPECPREFILL_ATOMIC(bits, type)                                                                      \
  type __tsan_atomic##bits##_load(const volatile type* p, int) {                                            \
    emulation::races::atomic(const_cast<type*>(p), sizeof(type), Atomic::load_acquire, SPECPREFILL_WHERE);  \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                            \
  }                                                                                                         \
  void __tsan_atomic##bits##_store(volatile type* p, type value, int) {                                     \
    emulation::races::atomic(const_cast<type*>(p), sizeof(type), Atomic::store_release, SPECPREFILL_WHERE); \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                         \
  type __tsan_atomic##bits##_exchange(volatile type* p, type value, int) {                                  \
    emulation::races::atomic(const_cast<type*>(p), sizeof(type), Atomic::update, SPECPREFILL_WHERE);        \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                                 \
  }                                                                                                         \
  SPECPREFILL_FETCH(bits, type, add)                                                                        \
  SPECPREFILL_FETCH(bits, type, sub)                                                                        \
  SPECPREFILL_FETCH(bits, type, and)                                                                        \
  SPECPREFILL_FETCH(bits, type, or)                                                                         \
  SPECPREFILL_FETCH(bits, type, xor)                                                                        \
  SPECPREFILL_FETCH(bits, type, nand)                                                                       \
  SPECPREFILL_SWAP(bits, type, strong, false)                                                               \
  SPECPREFILL_SWAP(bits, type, weak, true)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

SPECPREFILL_ACCESS(1)
SPECPREFILL_ACCESS(2)
SPECPREFILL_ACCESS(4)
SPECPREFILL_ACCESS(8)
SPECPREFILL_ACCESS(16)

void __tsan_read_range(void* p, size_t bytes) { emulation::races::read(p, bytes, SPECPREFILL_WHERE); }
void __tsan_write_range(void* p, size_t bytes) { emulation::races::write(p, bytes, SPECPREFILL_WHERE); }

SPECPREFILL_ATOMIC(8, uint8_t)
SPECPREFILL_ATOMIC(16, uint16_t)
SPECPREFILL_ATOMIC(32, uint32_t)
SPECPREFILL_ATOMIC(64, uint64_t)
}
// NOLINTEND

#endif
