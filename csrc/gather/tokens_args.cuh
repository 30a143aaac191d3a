// gather_tokens' arguments as kernels take them, for this room and for select_tokens.
#pragma once

#include "common/guarded.h"
#include "common/status.h"
#include "gather/shape.cuh"
#include "gather/tokens.cuh"

namespace specprefill {

// For checked arguments; `threads`: of a block. What they say about dimensions of one element is left out, so that it
// narrows no word. *num_tiles: of all.
inline int tokens_gather(const specprefill_gather_tokens& args, int threads, TokensGather* result,
                         unsigned* num_tiles) {
  TokensGather& g = *result;
  g = TokensGather{};
  const int64_t item = args.item_bytes;
  int64_t token_bytes = item, outer = 1;
  for (int i = 0; i < args.num_inner; ++i) token_bytes *= args.inner_sizes[i];
  for (int i = 0; i < args.num_outer; ++i) outer *= args.outer_sizes[i];
  const bool empty = token_bytes == 0 || outer == 0;  // positions and offsets are still to be written
  ByteDims dims;
  uint64_t strides = 0;
  int64_t below = token_bytes;
  for (int i = 0; i < args.num_inner && !empty; ++i) {
    below /= args.inner_sizes[i];
    dims.add(args.inner_sizes[i], args.inner_strides[i] * item, below);
  }
  dims.add_item(empty ? 1 : item);
  const bool packed = args.cu_seqlens != nullptr;
  const int64_t stride_batch = args.batch > 1 && !packed ? args.stride_batch * item : 0;
  const int64_t stride_token = args.tokens > 1 ? args.stride_token * item : 0;
  for (int i = 0; i < args.num_outer && !empty; ++i) {
    if (args.outer_sizes[i] == 1) continue;
    g.outer_sizes[g.num_outer] = args.outer_sizes[i];
    g.outer_strides[g.num_outer++] = args.outer_strides[i] * item;
    strides |= static_cast<uint64_t>(args.outer_strides[i] * item);
  }
  const int word = dims.word_bytes({strides, static_cast<uint64_t>(stride_batch), static_cast<uint64_t>(stride_token),
                                    static_cast<uint64_t>(token_bytes), reinterpret_cast<uintptr_t>(args.x),
                                    reinterpret_cast<uintptr_t>(args.values)});
  g.shape = dims.in_words(word);
  if (empty) g.shape.words = 0;
  g.tiles = row_tiles(g.shape, threads);
  for (int i = 0; i < g.num_outer; ++i) g.outer_strides[i] /= word;
  g.x = args.x, g.values = args.values;
  g.stride_batch = stride_batch / word, g.stride_token = stride_token / word;
  g.tokens = args.tokens;
  g.cu_seqlens = args.cu_seqlens;
  g.indices = args.indices, g.indices_stride = args.batch > 1 ? args.indices_stride : 0;
  g.num_kept = args.num_kept;
  g.position_ids = args.position_ids, g.offsets = args.offsets;
  g.batch = static_cast<unsigned>(args.batch), g.width = static_cast<unsigned>(args.width);
  g.slot_tiles = (g.width + g.tiles.rows - 1) / g.tiles.rows;
  const __int128 tiles = static_cast<__int128>(empty ? 1 : outer) * args.batch * g.slot_tiles *
                         ((g.shape.words + g.tiles.words - 1) / g.tiles.words + (empty ? 1 : 0));
  SPECPREFILL_REQUIRE(tiles <= kMaxSize, "x: expected a result that memory can hold, got %lld slices of %lld bytes",
                      static_cast<long long>(outer), static_cast<long long>(token_bytes));
  g.outer = empty ? 1 : static_cast<unsigned>(outer);
  *num_tiles = static_cast<unsigned>(tiles);
  return SPECPREFILL_OK;
}

}  // namespace specprefill
