// Compacting a key or value cache: where each slot's token lies and goes, in any layout.
#pragma once

#include "gather/copy.cuh"

namespace specprefill {

// One side of a copy; strides count words.
struct CacheSide {
  void* data;
  int64_t rows, tokens;  // tokens of a row: of a sequence, of all (packed), of a block (paged)
  int64_t stride_row, stride_head, stride_token;
  const int32_t* block_table;  // paged only
  int64_t table_stride, table_width;
};

struct CacheGather {
  CacheSide source, target;
  RowShape shape;
  RowTiles tiles;
  int layout;
  const int32_t* cu_seqlens;  // of the source, packed only
  const int32_t* indices;     // [B, K]
  int64_t indices_stride;
  const int32_t* num_kept;  // [B]
  unsigned batch, width;    // B, K
  unsigned slot_tiles;      // of a sequence
  unsigned heads;           // 1 where all heads of a token are one row
  unsigned num_tiles;       // in all
};

struct CacheTile {
  unsigned along, slots, head, b;
};

__device__ __forceinline__ CacheTile cache_tile(const CacheGather& g, unsigned tile) {
  CacheTile at;
  at.along = tile % g.tiles.along, tile /= g.tiles.along;
  at.slots = tile % g.slot_tiles, tile /= g.slot_tiles;
  at.head = tile % g.heads, at.b = tile / g.heads;
  return at;
}

// Token t of sequence b in a paged cache; kNoRow where the table or the cache has no such block.
__device__ __forceinline__ int64_t paged_row(const CacheSide& side, unsigned b, int64_t t) {
  const auto entry = static_cast<int64_t>(divide(static_cast<uint64_t>(t), static_cast<uint64_t>(side.tokens)));
  if (entry >= side.table_width) return kNoRow;
  const int64_t block = side.block_table[b * side.table_stride + entry];
  if (block < 0 || block >= side.rows) return kNoRow;
  return block * side.stride_row + (t - entry * side.tokens) * side.stride_token;
}

// The row of a slot that keeps the token at `position`. `before`: kept tokens of the sequences before b, where packed.
__device__ __forceinline__ Row cache_row(const CacheGather& g, unsigned b, unsigned slot, int position,
                                         unsigned before) {
  const CacheSide &source = g.source, &target = g.target;
  Row row{kNoRow, kNoRow};
  if (g.layout == SPECPREFILL_PAGED) {
    if (position >= 0) row.source = paged_row(source, b, position);
    row.target = paged_row(target, b, slot);
  } else if (g.layout == SPECPREFILL_PACKED) {
    const int64_t start = g.cu_seqlens[b], stop = min(static_cast<int64_t>(g.cu_seqlens[b + 1]), source.tokens);
    if (position >= 0 && start >= 0 && start + position < stop) row.source = (start + position) * source.stride_token;
    if (before + slot < target.tokens) row.target = (before + slot) * target.stride_token;
  } else {
    if (position >= 0 && position < source.tokens) {
      row.source = b * source.stride_row + position * source.stride_token;
    }
    if (slot < target.tokens) row.target = b * target.stride_row + slot * target.stride_token;
  }
  return row;
}

}  // namespace specprefill
