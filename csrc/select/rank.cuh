// Second phase: which chunks of a sequence are kept, by one block, exactly.
//
// By count, the smallest kept key is found digit by digit, eight bits at a time, from histograms of the keys that share
// the digits found so far; most searches end early, when all keys of a digit are kept. By mass it is found bit by bit,
// as sums in fp64 need a fixed order that a histogram has not; only the masses of keys that are still in question are
// read. Then the kept chunks are listed in order: each warp counts those of its part of the prompt, and writes them
// behind those of the warps before it.
#pragma once

#include "select/block.cuh"
#include "select/budget.cuh"

namespace specprefill {

// Keys of one sequence: in shared memory where they fit, else out of the second-level cache.
struct RankKeys {
  const unsigned* keys;
  const double* masses;
  unsigned count;
};

// Chunks above the threshold are kept, and the first `ties` of those at it.
struct Threshold {
  unsigned key, ties;
};

__device__ __forceinline__ void clear_histogram(RankScratch& rank) {
  auto* words = reinterpret_cast<uint4*>(rank.histogram);
  for (int i = threadIdx.x; i < 256 * kWarp / 4; i += kSelectThreads) words[i] = uint4{0, 0, 0, 0};
}

__device__ __forceinline__ void count_digit(RankScratch& rank, unsigned digit) {
  atomicAdd(&rank.histogram[digit * kWarp + threadIdx.x % kWarp], 1u);
}

// Finds, from the largest down, the digit in which the `wanted`-th key lies: rank.digit, with rank.left of its
// rank.in_digit keys wanted.
__device__ __forceinline__ void pick_digit(RankScratch& rank, BlockScratch& scratch, unsigned wanted) {
  const unsigned lane = threadIdx.x % kWarp;
  unsigned digit = 0, count = 0;
  if (threadIdx.x < 256) {
    digit = 255 - threadIdx.x;
#pragma unroll 8
    for (unsigned column = 0; column < kWarp; ++column) {
      count += rank.histogram[digit * kWarp + (column + lane) % kWarp];  // each lane in a bank of its own
    }
  }
  unsigned total;
  const unsigned reached = block_scan(count, scratch, &total);
  if (reached >= wanted && reached - count < wanted) {
    rank.digit = digit;
    rank.left = wanted - (reached - count);
    rank.in_digit = count;
  }
  __syncthreads();
}

// The threshold of the `wanted` largest keys, 1 <= wanted < count, after the histogram of the first digit.
__device__ __forceinline__ Threshold search_count(const RankKeys& of, unsigned wanted, SelectShared& shared) {
  RankScratch& rank = shared.rank;
  unsigned prefix = 0;
  for (int shift = 24;; shift -= 8) {
    pick_digit(rank, shared.block, wanted);
    prefix |= rank.digit << shift;
    wanted = rank.left;
    if (shift == 0 || rank.in_digit == wanted) return {prefix, wanted};
    clear_histogram(rank);
    __syncthreads();
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < of.count; i += kSelectThreads) {
      const unsigned key = of.keys[i];
      if ((key ^ prefix) >> shift == 0) count_digit(rank, key >> (shift - 8) & 0xff);
    }
    __syncthreads();
  }
}

// The mass of the keys in [low, low + size), the last of which is 2^32 - 1 at most.
__device__ __forceinline__ double mass_between(const RankKeys& of, unsigned low, unsigned size, BlockScratch& scratch) {
  double sum = 0;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < of.count; i += kSelectThreads) {
    if (of.keys[i] - low < size) sum += of.masses[i];
  }
  return block_sum(sum, scratch);
}

// Of the chunks at the threshold, those that have less than `needed` before them, the ones above it holding `held`.
__device__ __forceinline__ unsigned ties_for_mass(const RankKeys& of, unsigned threshold, double held, double needed,
                                                  SelectShared& shared) {
  unsigned ties = 0;
  for (unsigned first = 0; first < of.count; first += kSelectThreads) {
    const unsigned i = first + threadIdx.x;
    const bool tie = i < of.count && of.keys[i] == threshold;
    if (!__syncthreads_or(tie)) continue;
    const double mass = tie ? of.masses[i] : 0.0;
    double total;
    const double reached = block_scan(mass, shared.block, &total);
    ties += tie && held + (reached - mass) < needed;
    held += total;
  }
  return max(block_sum(ties, shared.block), 1u);  // one chunk is kept even if nothing is needed
}

// The fewest of the best chunks that hold the wanted fraction of all. Where no sum is a number, all chunks are kept.
__device__ __forceinline__ Threshold search_mass(const RankKeys& of, double fraction, SelectShared& shared) {
  double sum = 0;
  unsigned largest = 0;
  for (unsigned i = threadIdx.x; i < of.count; i += kSelectThreads) {
    sum += of.masses[i];
    largest = max(largest, of.keys[i]);
  }
  const double needed = fraction * block_sum(sum, shared.block);
  largest = __reduce_max_sync(kAllLanes, largest);
  if (threadIdx.x % kWarp == 0) shared.rank.above[threadIdx.x / kWarp] = largest;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kSelectWarps; ++warp) largest = max(largest, shared.rank.above[warp]);
  // Keys not below `threshold` hold what is needed, and `held` is the mass of those not below its upper end.
  unsigned threshold = 0;
  double held = 0;
  for (unsigned bit = 0x80000000u; bit; bit >>= 1) {
    const unsigned tried = threshold | bit;
    const double more = mass_between(of, tried, bit, shared.block);
    if (held + more >= needed && tried <= largest) {
      threshold = tried;
    } else {
      held += more;
    }
  }
  if (threshold == kForced) return {threshold, of.count};
  if (threshold == kAbsent) return {threshold, 0};
  return {threshold, ties_for_mass(of, threshold, held, needed, shared)};
}

// Lists the kept chunks of sequence b in order and counts their tokens.
__device__ __forceinline__ void list_chunks(const SelectParams& p, unsigned b, int length, const RankKeys& of,
                                            Threshold threshold, RankScratch& rank) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned part = (of.count + kSelectThreads - 1) / kSelectThreads * kWarp;  // of a warp
  const unsigned first = min(warp * part, of.count), last = min(first + part, of.count);
  unsigned above = 0, ties = 0;
  for (unsigned i = first; i < last; i += kWarp) {
    const unsigned key = i + lane < last ? of.keys[i + lane] : kAbsent;
    above += __popc(__ballot_sync(kAllLanes, key > threshold.key));
    ties += __popc(__ballot_sync(kAllLanes, key == threshold.key && key != kAbsent));
  }
  __syncthreads();  // `above` may still be read from the search
  if (lane == 0) rank.above[warp] = above, rank.ties[warp] = ties;
  __syncthreads();
  unsigned all_above = 0, all_ties = 0;
  above = ties = 0;
#pragma unroll
  for (unsigned other = 0; other < kSelectWarps; ++other) {
    if (other < warp) above += rank.above[other], ties += rank.ties[other];
    all_above += rank.above[other], all_ties += rank.ties[other];
  }
  int32_t* ids = p.chunk_ids + static_cast<int64_t>(b) * p.num_chunks;
  const unsigned lower = (1u << lane) - 1;
  for (unsigned i = first; i < last; i += kWarp) {
    const unsigned key = i + lane < last ? of.keys[i + lane] : kAbsent;
    const bool is_above = key > threshold.key, is_tie = key == threshold.key && key != kAbsent;
    const unsigned more = __ballot_sync(kAllLanes, is_above), more_ties = __ballot_sync(kAllLanes, is_tie);
    const unsigned above_before = above + __popc(more & lower), ties_before = ties + __popc(more_ties & lower);
    if (is_above || (is_tie && ties_before < threshold.ties)) {
      ids[above_before + min(ties_before, threshold.ties)] = static_cast<int32_t>(i + lane);
    }
    above += __popc(more), ties += __popc(more_ties);
  }
  if (threadIdx.x == 0) {
    int64_t kept = static_cast<int64_t>(all_above + min(all_ties, threshold.ties)) * p.chunk_size;
    if (of.count) {
      // Only the prompt's last chunk may be short. It is the last of the ties, if it is one.
      const unsigned key = of.keys[of.count - 1];
      const bool has_last = key > threshold.key || (key == threshold.key && all_ties <= threshold.ties);
      if (has_last) kept -= static_cast<int64_t>(of.count) * p.chunk_size - length;
    }
    p.num_kept[b] = static_cast<int32_t>(kept);
  }
}

__device__ __forceinline__ void rank_sequence(const SelectParams& p, unsigned b, SelectShared& shared) {
  const int length = clamped_length(p.source.seq_lens, b, p.source.max_len, 0);
  const int64_t row = static_cast<int64_t>(b) * p.num_chunks;
  // No sum of two: it would pass 2^31 for the longest prompts.
  const int chunks = length / p.chunk_size + (length % p.chunk_size != 0);
  RankKeys of{p.keys + row, p.by_mass ? p.masses + row : nullptr, static_cast<unsigned>(chunks)};
  unsigned* held = chunks <= p.held_keys ? shared.keys() : nullptr;
  if (!p.by_mass) clear_histogram(shared.rank);
  __syncthreads();
  unsigned forced = 0;
#pragma unroll 4
  for (unsigned i = threadIdx.x; i < of.count; i += kSelectThreads) {
    const unsigned key = of.keys[i];
    if (held) held[i] = key;
    forced += key == kForced;
    if (!p.by_mass) count_digit(shared.rank, key >> 24);
  }
  forced = block_sum(forced, shared.block);  // also the barrier behind the histogram and the held keys
  if (held) of.keys = held;
  Threshold threshold{kAbsent, 0};  // all of them
  bool overflow = false;
  if (p.by_mass) {
    threshold = search_mass(of, p.mass_fraction, shared);
  } else {
    const unsigned budget = chunk_budget(p, chunks);
    overflow = forced > budget;
    const unsigned wanted = max(budget, forced);  // they have the largest keys, and all of them are kept
    if (wanted < of.count) threshold = search_count(of, wanted, shared);
  }
  if (threadIdx.x == 0) p.overflow[b] = overflow;
  list_chunks(p, b, length, of, threshold, shared.rank);
}

}  // namespace specprefill
