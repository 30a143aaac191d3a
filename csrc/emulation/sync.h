// Barriers, fences and waiting.
#pragma once

#include "emulation/language.h"

namespace emulation {

enum class Barrier : uint8_t { sync, vote_or, vote_and, vote_count };

// All threads of the block that have not exited; returns the vote over `predicate`.
int block_barrier(Barrier kind, int predicate);
void warp_barrier(uint32_t mask);
// Lets other threads run. A grid in which nobody does anything else for long is reported as stuck.
void sleep();
// Orders the thread's accesses to memory before it against those after it, for threads of the block only or all.
void fence(bool block_only);

}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(emulation::Barrier::sync, 0); }
inline int __syncthreads_or(int predicate) { return emulation::block_barrier(emulation::Barrier::vote_or, predicate); }
inline int __syncthreads_and(int predicate) {
  return emulation::block_barrier(emulation::Barrier::vote_and, predicate);
}
inline int __syncthreads_count(int predicate) {
  return emulation::block_barrier(emulation::Barrier::vote_count, predicate);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_barrier(mask); }
inline void __nanosleep(unsigned) { emulation::sleep(); }
inline void __threadfence_block() { emulation::fence(true); }
inline void __threadfence() { emulation::fence(false); }
inline void __threadfence_system() { emulation::fence(false); }
