// What the race detector has to be told, by the parts of the emulator. Without SPECPREFILL_EMULATION_RACES there is
// none, and all of this is empty.
#pragma once

#include "emulation/grid.h"

namespace emulation {
namespace races {

enum class Atomic { load, store, update };

#if defined(SPECPREFILL_EMULATION_RACES)

// Of a stack: accesses there are never checked.
void forget_range(const void* memory, size_t bytes);

void start_grid(Grid& grid);
void finish_grid(Grid& grid);
void start_block(Block& block);
void finish_block(Block& block);
void exit_thread(Thread& thread);

void block_barrier(Block& block);
void warp_barrier(Warp& warp, uint32_t mask);
void fence(Thread& thread);

// By the running thread.
void atomic(const void* address, size_t bytes, Atomic kind);
void start_copy(void* to, size_t bytes);
void finish_copy(void* to, const void* from, size_t bytes, size_t total);

#else

inline void forget_range(const void*, size_t) {}
inline void start_grid(Grid&) {}
inline void finish_grid(Grid&) {}
inline void start_block(Block&) {}
inline void finish_block(Block&) {}
inline void exit_thread(Thread&) {}
inline void block_barrier(Block&) {}
inline void warp_barrier(Warp&, uint32_t) {}
inline void fence(Thread&) {}
inline void atomic(const void*, size_t, Atomic) {}
inline void start_copy(void*, size_t) {}
inline void finish_copy(void*, const void*, size_t, size_t) {}

#endif

}  // namespace races
}  // namespace emulation
