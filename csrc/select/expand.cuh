// Third phase: kept chunks to token positions, and the tokens themselves.
#pragma once

#include "gather/tokens.cuh"
#include "select/block.cuh"

namespace specprefill {

// offsets[b]: kept tokens of the sequences before b. By one block, once all are ranked.
__device__ __forceinline__ void write_offsets(const SelectParams& p, BlockScratch& scratch) {
  __syncthreads();  // one thread wrote the last count
  unsigned before = 0;
  for (unsigned first = 0; first < p.batch; first += kSelectThreads) {
    const unsigned b = first + threadIdx.x;
    const unsigned kept = b < p.batch ? static_cast<unsigned>(p.num_kept[b]) : 0;
    unsigned total;
    const unsigned reached = block_scan(kept, scratch, &total);
    if (b < p.batch) p.gather.offsets[b] = static_cast<int32_t>(before + reached - kept);
    before += total;
  }
  if (threadIdx.x == 0) p.gather.offsets[p.batch] = static_cast<int32_t>(before);
}

__device__ __forceinline__ KeptTokens kept_tokens(const SelectParams& p, unsigned b) {
  KeptTokens kept{static_cast<unsigned>(p.num_kept[b]), 0, 0};
  if (p.gathers) {
    kept.before = static_cast<unsigned>(p.gather.offsets[b]);
    kept.total = static_cast<unsigned>(p.gather.offsets[p.batch]);
  }
  return kept;
}

// The position in slot `slot`, which keeps one.
__device__ __forceinline__ int kept_position(const SelectParams& p, unsigned b, unsigned slot) {
  const unsigned size = static_cast<unsigned>(p.chunk_size), chunk = slot / size;
  return p.chunk_ids[static_cast<int64_t>(b) * p.num_chunks + chunk] * p.chunk_size +
         static_cast<int>(slot - chunk * size);
}

// Positions of four slots a thread, and their position ids where tokens are packed.
__device__ __forceinline__ void expand(const SelectParams& p, unsigned job) {
  const unsigned b = job / p.expand_jobs_per_sequence;
  const unsigned first = job % p.expand_jobs_per_sequence * kSelectTokens + 4 * threadIdx.x;
  if (first >= p.width) return;
  const KeptTokens kept = kept_tokens(p, b);
  int positions[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) positions[i] = first + i < kept.here ? kept_position(p, b, first + i) : -1;
  int32_t* out = p.indices + static_cast<int64_t>(b) * p.width + first;
  if (p.width % 4 == 0 && reinterpret_cast<uintptr_t>(p.indices) % 16 == 0) {
    *reinterpret_cast<int4*>(out) = make_int4(positions[0], positions[1], positions[2], positions[3]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < p.width) out[i] = positions[i];
    }
  }
  if (!p.gathers) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (first + i < p.width) p.gather.position_ids[packed_slot(p.gather, kept, b, first + i)] = max(positions[i], 0);
  }
}

__device__ __forceinline__ void gather(const SelectParams& p, unsigned tile, SelectShared& shared) {
  const TokensGather& g = p.gather;
  const TokensTile at = tokens_tile(g, tile);
  const unsigned first = at.slots * g.tiles.rows, slots = min(g.width - first, g.tiles.rows);
  const KeptTokens kept = kept_tokens(p, at.b);
  const TokensRoom room = tokens_room(g, at.b);
  __syncthreads();  // the rows of the tile before are copied
  for (unsigned i = threadIdx.x; i < slots; i += kSelectThreads) {
    const unsigned slot = first + i;
    const bool is_kept = slot < kept.here;
    const int position = is_kept ? kept_position(p, at.b, slot) : 0;
    shared.rows[i] = token_row(g, room, is_kept, position, packed_slot(g, kept, at.b, slot));
  }
  __syncthreads();
  copy_tokens<kSelectThreads>(g, at, shared.rows, slots);
}

}  // namespace specprefill
