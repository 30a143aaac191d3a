// Packing the kept tokens of x: where each slot's token lies and goes.
#pragma once

#include "gather/copy.cuh"

namespace specprefill {

struct TokensGather {
  const void* x;  // [outer..., B, T, inner...] or packed; strides count words
  void* values;   // [outer..., B * K, inner...], contiguous
  RowShape shape;
  RowTiles tiles;
  int num_outer;
  int64_t outer_sizes[SPECPREFILL_MAX_DIMS], outer_strides[SPECPREFILL_MAX_DIMS];
  int64_t stride_batch, stride_token;
  int64_t tokens;             // T, or of the packed x
  const int32_t* cu_seqlens;  // [B + 1] or null
  const int32_t* indices;     // [B, K]
  int64_t indices_stride;
  const int32_t* num_kept;  // [B]
  int64_t* position_ids;    // [B * K]
  int32_t* offsets;         // [B + 1]
  unsigned batch, width;    // B, K; B * K is below 2^31
  unsigned slot_tiles;      // of a sequence
  unsigned outer;           // slices before the tokens
};

// One tile: which slots of which sequence, what part of their rows, in which slice.
struct TokensTile {
  unsigned along, slots, b, outer;
};

__device__ __forceinline__ TokensTile tokens_tile(const TokensGather& g, unsigned tile) {
  TokensTile at;
  at.along = tile % g.tiles.along, tile /= g.tiles.along;
  at.slots = tile % g.slot_tiles, tile /= g.slot_tiles;
  at.b = tile % g.batch, at.outer = tile / g.batch;
  return at;
}

// The kept tokens of one sequence among those of all.
struct KeptTokens {
  unsigned here, before, total;
};

// Slots that keep nothing share the room behind the last token, so that one pass writes every slot once.
__device__ __forceinline__ unsigned packed_slot(const TokensGather& g, const KeptTokens& kept, unsigned b,
                                                unsigned slot) {
  return slot < kept.here ? kept.before + slot : kept.total + (b * g.width - kept.before) + (slot - kept.here);
}

// Where the tokens of sequence b start in x, and which positions are there.
struct TokensRoom {
  int64_t start, room;
};

__device__ __forceinline__ TokensRoom tokens_room(const TokensGather& g, unsigned b) {
  if (!g.cu_seqlens) return {b * g.stride_batch, g.tokens};
  const int64_t start = g.cu_seqlens[b], stop = g.cu_seqlens[b + 1];
  return {start * g.stride_token, start < 0 ? 0 : min(stop, g.tokens) - start};
}

// From the first word of the slice, both ways.
__device__ __forceinline__ Row token_row(const TokensGather& g, const TokensRoom& in, bool kept, int position,
                                         unsigned packed) {
  const bool there = kept && position >= 0 && position < in.room;
  return {there ? in.start + position * g.stride_token : kNoRow, packed * g.shape.words};
}

// Copies the rows of one tile, within their slice.
template <int kThreads>
__device__ __forceinline__ void copy_tokens(const TokensGather& g, const TokensTile& at, const Row* rows,
                                            unsigned num_rows) {
  int64_t skip = 0;
  uint64_t rest = at.outer;
#pragma unroll 1
  for (int dim = g.num_outer - 1; dim >= 0; --dim) {
    const auto size = static_cast<uint64_t>(g.outer_sizes[dim]);
    const uint64_t above = divide(rest, size);
    skip += static_cast<int64_t>(rest - above * size) * g.outer_strides[dim];
    rest = above;
  }
  const auto* x = static_cast<const unsigned char*>(g.x) + skip * g.shape.word_bytes;
  const int64_t slice_words = static_cast<int64_t>(g.batch) * g.width * g.shape.words;
  auto* values = static_cast<unsigned char*>(g.values) + at.outer * slice_words * g.shape.word_bytes;
  copy_tile<kThreads>(g.shape, g.tiles, x, values, rows, num_rows, at.along);
}

}  // namespace specprefill
