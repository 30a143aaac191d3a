// Gathering: `gather_tokens` and `gather_kv`, one launch and one pass each.
//
// Bytes that must move: what is kept, in and out, and for tokens the zeros behind it and 8 bytes a slot of
// position_ids; 4 bytes a slot of indices, once for each slice or head. 26K of 128K tokens (keep_ratio 0.2) with 8
// heads of 128 in fp16 are 54 MB each way for keys and as much for values: 64 us at 3.35 TB/s. Ids are 0.6 MB, nothing
// beside a launch.
//
// A block copies one tile of 16 KiB: first it works out where each row of the tile lies and goes, in shared memory, so
// that positions, block tables and divisions are met once a row and not once a word; then every thread has four words
// on their way. Tiles follow each other in the order of the target, and one sequence's slots in that of the source. No
// block waits for another, so the grid is as large as there are tiles.
#pragma once

#include "gather/cache.cuh"
#include "gather/tokens.cuh"

namespace specprefill {

constexpr int kGatherThreads = 256;
constexpr int kGatherRows = kGatherThreads * kWordsPerThread;  // of a tile, at most

struct GatherShared {
  Row rows[kGatherRows];
  unsigned before[kGatherThreads / kWarp], total[kGatherThreads / kWarp];
};

__device__ __forceinline__ unsigned kept_of(const int32_t* num_kept, unsigned b, unsigned width) {
  return min(static_cast<unsigned>(max(num_kept[b], 0)), width);
}

// Kept tokens of sequence b, before it, and of all. All threads call it; ends with a barrier where B > 1.
__device__ __forceinline__ KeptTokens kept_tokens(GatherShared& shared, const int32_t* num_kept, unsigned b,
                                                  unsigned batch, unsigned width) {
  KeptTokens kept{kept_of(num_kept, b, width), 0, 0};
  if (batch == 1) {
    kept.total = kept.here;
    return kept;
  }
  unsigned before = 0, total = 0;
  for (unsigned other = threadIdx.x; other < batch; other += kGatherThreads) {
    const unsigned count = kept_of(num_kept, other, width);
    total += count;
    if (other < b) before += count;
  }
  before = __reduce_add_sync(kAllLanes, before);
  total = __reduce_add_sync(kAllLanes, total);
  if (threadIdx.x % kWarp == 0) {
    shared.before[threadIdx.x / kWarp] = before;
    shared.total[threadIdx.x / kWarp] = total;
  }
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kGatherThreads / kWarp; ++warp) {
    kept.before += shared.before[warp];
    kept.total += shared.total[warp];
  }
  return kept;
}

__global__ void __launch_bounds__(kGatherThreads, 3) gather_tokens_kernel(const __grid_constant__ TokensGather g) {
  auto& shared = *reinterpret_cast<GatherShared*>(shared_memory());
  const TokensTile at = tokens_tile(g, blockIdx.x);
  const unsigned first = at.slots * g.tiles.rows, slots = min(g.width - first, g.tiles.rows);
  const KeptTokens kept = kept_tokens(shared, g.num_kept, at.b, g.batch, g.width);
  const TokensRoom room = tokens_room(g, at.b);
  const bool also_positions = at.along == 0 && at.outer == 0;
  for (unsigned i = threadIdx.x; i < slots; i += kGatherThreads) {
    const unsigned slot = first + i;
    const bool is_kept = slot < kept.here;
    const int position = is_kept ? g.indices[at.b * g.indices_stride + slot] : 0;
    const unsigned packed = packed_slot(g, kept, at.b, slot);
    shared.rows[i] = token_row(g, room, is_kept, position, packed);
    if (also_positions) g.position_ids[packed] = position;
  }
  if (also_positions && at.slots == 0 && threadIdx.x == 0) {
    g.offsets[at.b] = static_cast<int32_t>(kept.before);
    if (at.b == g.batch - 1) g.offsets[g.batch] = static_cast<int32_t>(kept.total);
  }
  __syncthreads();
  copy_tokens<kGatherThreads>(g, at, shared.rows, slots);
}

// Both caches in one launch: the first tiles are those of the first.
__global__ void __launch_bounds__(kGatherThreads, 3)
    gather_kv_kernel(const __grid_constant__ CacheGather first_cache,
                     const __grid_constant__ CacheGather second_cache) {
  auto& shared = *reinterpret_cast<GatherShared*>(shared_memory());
  const bool second = blockIdx.x >= first_cache.num_tiles;
  const CacheGather& g = second ? second_cache : first_cache;
  const CacheTile at = cache_tile(g, second ? blockIdx.x - first_cache.num_tiles : blockIdx.x);
  const unsigned first = at.slots * g.tiles.rows;
  KeptTokens kept{kept_of(g.num_kept, at.b, g.width), 0, 0};
  if (first >= kept.here) return;  // nothing is written behind the kept tokens
  if (g.layout == SPECPREFILL_PACKED) kept = kept_tokens(shared, g.num_kept, at.b, g.batch, g.width);
  const unsigned slots = min(kept.here - first, g.tiles.rows);
  for (unsigned i = threadIdx.x; i < slots; i += kGatherThreads) {
    const int position = g.indices[at.b * g.indices_stride + first + i];
    shared.rows[i] = cache_row(g, at.b, first + i, position, kept.before);
  }
  __syncthreads();
  const auto* source = static_cast<const unsigned char*>(g.source.data);
  auto* target = static_cast<unsigned char*>(g.target.data);
  copy_tile<kGatherThreads>(g.shape, g.tiles, source + at.head * g.source.stride_head * g.shape.word_bytes,
                            target + at.head * g.target.stride_head * g.shape.word_bytes, shared.rows, slots, at.along);
}

}  // namespace specprefill
