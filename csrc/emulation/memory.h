// Shared memory, copies beside the arithmetic, and loads and stores that have names of their own.
#pragma once

#include "emulation/language.h"

namespace emulation {

// The block's dynamic shared memory, which starts as 0xff everywhere. 16-byte aligned and, on purpose, no more.
unsigned char* shared_memory();

// Queues a copy. Its bytes are read and written in the matching wait at the latest; until then the target is 0xff.
void copy_async_16(void* to_shared, const void* from, int bytes);
void copy_async_commit();
void copy_async_wait(int pending);

template <class T>
T load_relaxed(const T* address);  // float and unsigned
unsigned load_acquire(const unsigned* address);
void store_release(unsigned* address, unsigned value);

}  // namespace emulation

#define SPECPREFILL_LOAD(name)               \
  template <class T>                         \
  __forceinline__ T name(const T* address) { \
    return *address;                         \
  }
#define SPECPREFILL_STORE(name)                    \
  template <class T>                               \
  __forceinline__ void name(T* address, T value) { \
    *address = value;                              \
  }
SPECPREFILL_LOAD(__ldg)
SPECPREFILL_LOAD(__ldca)
SPECPREFILL_LOAD(__ldcg)
SPECPREFILL_LOAD(__ldcs)
SPECPREFILL_LOAD(__ldlu)
SPECPREFILL_LOAD(__ldcv)
SPECPREFILL_STORE(__stwb)
SPECPREFILL_STORE(__stcg)
SPECPREFILL_STORE(__stcs)
SPECPREFILL_STORE(__stwt)
#undef SPECPREFILL_LOAD
#undef SPECPREFILL_STORE
