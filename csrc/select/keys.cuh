// First phase: importance to one key per chunk, and its mass for a budget by mass.
#pragma once

#include "select/block.cuh"

namespace specprefill {

// -0 is 0.
__device__ __forceinline__ unsigned ordered_key(float x) {
  if (x != x) return kNan;
  const unsigned bits = x == 0 ? 0u : __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// One sequence, as the first phase sees it.
struct Sequence {
  unsigned b;
  int length, rows;
};

__device__ __forceinline__ Sequence sequence_of(const SelectParams& p, unsigned b) {
  return {b, clamped_length(p.source.seq_lens, b, p.source.max_len, 0),
          clamped_length(p.source.num_look_ahead, b, p.source.look_ahead, 1)};
}

// Importance of tokens t to t + 3, of which those in [start, stop) are this job's: written where a copy is asked for.
__device__ __forceinline__ Four job_importance(const SelectParams& p, const Sequence& of, int64_t t, int64_t start,
                                               int64_t stop) {
  const int at = static_cast<int>(t);
  const Four four = importance_of_four(p.source, of.b, of.rows, at, of.length);
  if (!p.importance) return four;
  float* out = p.importance + static_cast<int64_t>(of.b) * p.source.max_len + at;
  if (t >= start && t + 4 <= stop && p.source.max_len % 4 == 0 && reinterpret_cast<uintptr_t>(p.importance) % 16 == 0) {
    *reinterpret_cast<float4*>(out) = make_float4(four.x[0], four.x[1], four.x[2], four.x[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (t + i >= start && t + i < stop) out[i] = four.x[i];
    }
  }
  return four;
}

__device__ __forceinline__ bool is_protected(const SelectParams& p, unsigned b, int64_t t) {
  return p.protect[b * p.protect_stride_batch + t * p.protect_stride_token] != 0;
}

// Writes what the sum of a chunk's tokens [start, stop) makes of it.
__device__ __forceinline__ void write_key(const SelectParams& p, const Sequence& of, int chunk, int64_t start,
                                          int64_t stop, double sum, bool forced) {
  const int64_t at = static_cast<int64_t>(of.b) * p.num_chunks + chunk;
  if (p.by_mass) p.masses[at] = sum;
  forced |= start < p.sink || stop > of.length - p.tail;
  const double rank = p.by_mass ? sum : sum / static_cast<double>(stop - start);
  p.keys[at] = forced ? kForced : ordered_key(static_cast<float>(rank));
}

// Keys of `count` chunks from the tile, which starts with chunk `first`.
__device__ __forceinline__ void add_chunks(const SelectParams& p, const Sequence& of, int first, int count,
                                           const float* tile) {
  const int lane = threadIdx.x % p.lanes, groups = kSelectThreads / p.lanes;
  // All lanes of a warp go round together, as they add in groups.
  for (int block = 0; block < count; block += groups) {
    const int i = block + static_cast<int>(threadIdx.x) / p.lanes;
    const int64_t from = (static_cast<int64_t>(first) + i) * p.chunk_size;
    const int64_t to = min(from + p.chunk_size, static_cast<int64_t>(of.length));
    const bool there = i < count && from < of.length;
    double sum = 0;
    bool forced = false;
    if (there) {
      const float* chunk = tile + i * p.chunk_size;
      const int size = static_cast<int>(to - from);
      for (int t = lane; t < size; t += p.lanes) {
        sum += chunk[t];
        if (p.protect) forced |= is_protected(p, of.b, from + t);
      }
    }
    sum = group_sum(sum, p.lanes);
    const unsigned protecting = __ballot_sync(kAllLanes, forced);
    const unsigned group = (p.lanes == kWarp ? kAllLanes : (1u << p.lanes) - 1) << (threadIdx.x % kWarp - lane);
    if (there && lane == 0) write_key(p, of, first + i, from, to, sum, (protecting & group) != 0);
  }
}

// One job: `count` chunks of a sequence from `first` on, which fit one tile, or one that no tile holds.
__device__ __forceinline__ void make_keys(const SelectParams& p, const Sequence& of, int first, int count,
                                          SelectShared& shared) {
  const int64_t start = static_cast<int64_t>(first) * p.chunk_size;
  const int64_t stop = min(start + static_cast<int64_t>(count) * p.chunk_size, static_cast<int64_t>(p.source.max_len));
  // Chunks behind the end have no key; importance is 0 there.
  if (!p.importance && start >= of.length) return;
  const int64_t inside = min(stop, static_cast<int64_t>(of.length));
  const bool is_long = p.chunk_size > kSelectTokens;
  double sum = 0;
  bool forced = false;
  // From a multiple of 4 tokens on, so that loads stay wide.
  for (int64_t t = (start & ~int64_t{3}) + 4 * threadIdx.x; t < stop; t += kSelectTokens) {
    const Four four = job_importance(p, of, t, start, stop);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (t + i < start || t + i >= inside) continue;
      if (!is_long) {
        shared.tile[t + i - start] = four.x[i];
      } else {  // each thread adds its own tokens, then the block adds up
        sum += four.x[i];
        if (p.protect) forced |= is_protected(p, of.b, t + i);
      }
    }
  }
  if (!is_long) {
    __syncthreads();
    return add_chunks(p, of, first, count, shared.tile);
  }
  sum = block_sum(sum, shared.block);
  forced = __syncthreads_or(forced);
  if (threadIdx.x == 0 && start < inside) write_key(p, of, first, start, inside, sum, forced);
}

}  // namespace specprefill
