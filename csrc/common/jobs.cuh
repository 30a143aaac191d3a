// A grid that takes its work in order: blocks draw tickets, and a job may wait for jobs with lower tickets.
//
// Whoever holds a lower ticket is running or has finished, so a wait always ends, however few of the grid's blocks fit
// the device at a time. That puts phases that depend on each other into one launch.
//
// Counters and flags start at zero.
#pragma once

#include "common/device.cuh"
#include "common/ptx.cuh"

namespace specprefill {

// The block's next job number. All threads call it; what was in shared memory before it may be overwritten after it.
// `slot` is a word of shared memory for this alone.
__device__ __forceinline__ unsigned next_ticket(unsigned* counter, unsigned* slot) {
  __syncthreads();
  if (threadIdx.x == 0) *slot = atomicAdd(counter, 1u);
  __syncthreads();
  return *slot;
}

// Says that this block has finished one of `total` jobs. True in the block that finishes the last one, which then sees
// what all of them wrote. All threads call it; the same use of `slot` as above.
__device__ __forceinline__ bool finished_last(unsigned* counter, unsigned total, unsigned* slot) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *slot = atomicAdd(counter, 1u);
  __syncthreads();
  const bool last = *slot == total - 1;
  if (last) __threadfence();
  return last;
}

// Raises a flag behind everything that the block's threads have written. All threads call it.
__device__ __forceinline__ void raise_flag(unsigned* flag) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) store_release(flag, 1u);
}

// Waits for a flag; then the block's threads see what was written before it was raised. All threads call it.
__device__ __forceinline__ void wait_for_flag(const unsigned* flag) {
  if (threadIdx.x == 0) {
    // Not by acquiring reads: each of these empties the first-level cache, which the processor's other blocks use.
    while (load_relaxed(flag) == 0) __nanosleep(100);
    (void)load_acquire(flag);
  }
  __syncthreads();
}

}  // namespace specprefill
