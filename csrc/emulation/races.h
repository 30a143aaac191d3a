// What the race detector has to be told by the other parts. Without SPECPREFILL_EMULATION_RACES there is none, and all
// of this is empty.
//
// Two accesses to the same byte race when at least one writes, not both are atomic, and nothing orders them. What
// orders:
// - __syncthreads and its votes: all threads of the block; __syncwarp: the lanes in its mask. Shuffles, votes and mma
// do
//   not: CUDA promises nothing about memory there.
// - between threads that no barrier joins: an atomic (or volatile) store or update behind a __threadfence, read by an
//   atomic with a __threadfence behind it; store_release and load_acquire need no fence. A fence also counts for what
//   the block's barriers before it have joined, and one in every thread that wrote, before a barrier, for all of them.
// - launches.
#pragma once

#include "emulation/grid.h"

namespace emulation {
namespace races {

// relaxed: orders only with fences around it.
enum class Atomic { relaxed_load, relaxed_store, update, load_acquire, store_release };

#if defined(SPECPREFILL_EMULATION_RACES)

void start_grid();
void finish_grid();
void start_block(Block& block);
void block_barrier(Block& block);
void warp_barrier(Warp& warp, uint32_t lanes);

// By the running thread, outside of kernels of nobody. `where`: the code's address.
void fence(bool block_only);
void read(const void* address, size_t bytes, const void* where);
void write(const void* address, size_t bytes, const void* where);
void atomic(const void* address, size_t bytes, Atomic kind, const void* where);
// A copy of `bytes` into 16: from here to finish_copy nobody may use its target.
void start_copy(const void* to, const void* from, size_t bytes, const void* where);
void finish_copy(const void* to, const void* from, size_t bytes, const void* where);

#else

inline void start_grid() {}
inline void finish_grid() {}
inline void start_block(Block&) {}
inline void block_barrier(Block&) {}
inline void warp_barrier(Warp&, uint32_t) {}
inline void fence(bool) {}
inline void atomic(const void*, size_t, Atomic, const void*) {}
inline void start_copy(const void*, const void*, size_t, const void*) {}
inline void finish_copy(const void*, const void*, size_t, const void*) {}

#endif

}  // namespace races
}  // namespace emulation
