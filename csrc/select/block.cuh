// Sums and scans over a block, in an order that depends on nothing but the thread's number.
#pragma once

#include "select/params.cuh"

namespace specprefill {

// In each lane the sum of the lanes up to it.
template <class T>
__device__ __forceinline__ T warp_scan(T x) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T below = __shfl_up_sync(kAllLanes, x, step);
    if (lane >= step) x += below;
  }
  return x;
}

// In each of the warp's groups of `lanes` neighbours, their sum.
__device__ __forceinline__ double group_sum(double x, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ double* scratch_of(BlockScratch& scratch, double) { return scratch.masses; }
__device__ __forceinline__ unsigned* scratch_of(BlockScratch& scratch, unsigned) { return scratch.counts; }

// The sum over all threads, in each of them. All threads call it, as they do all functions here.
template <class T>
__device__ __forceinline__ T block_sum(T x, BlockScratch& scratch) {
  T* sums = scratch_of(scratch, x);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  __syncthreads();  // nobody reads the last call's sums any more
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = x;
  __syncthreads();
  T total = 0;
#pragma unroll
  for (int warp = 0; warp < kSelectWarps; ++warp) total += sums[warp];
  return total;
}

// In each thread the sum of the threads up to it; *total: of all.
template <class T>
__device__ __forceinline__ T block_scan(T x, BlockScratch& scratch, T* total) {
  T* sums = scratch_of(scratch, x);
  const unsigned warp = threadIdx.x / kWarp;
  x = warp_scan(x);
  __syncthreads();
  if (threadIdx.x % kWarp == kWarp - 1) sums[warp] = x;
  __syncthreads();
  T before = 0;
  *total = 0;
#pragma unroll
  for (unsigned other = 0; other < kSelectWarps; ++other) {
    if (other < warp) before += sums[other];
    *total += sums[other];
  }
  return before + x;
}

}  // namespace specprefill
