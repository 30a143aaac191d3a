#include "common/guarded.h"
#include "common/launch.cuh"
#include "gather/check.h"
#include "gather/kernel.cuh"
#include "gather/tokens_args.cuh"

namespace specprefill {
namespace {

long long ll(int64_t x) { return static_cast<long long>(x); }

CacheSide cache_side(const specprefill_cache& cache, const int32_t* table, int64_t table_stride, int64_t table_width) {
  return {const_cast<void*>(cache.data),
          cache.rows,
          cache.tokens,
          cache.stride_row,
          cache.stride_head,
          cache.stride_token,
          table,
          table_stride,
          table_width};
}

// Strides of elements become strides of words.
void to_words(CacheSide& side, int64_t item_bytes, int word) {
  for (int64_t* stride : {&side.stride_row, &side.stride_head, &side.stride_token})
    *stride = *stride * item_bytes / word;
}

// The bits that addresses and strides have; those of dimensions of one element do not count.
uint64_t side_bits(CacheSide& side, int64_t item_bytes, int64_t heads, bool rows_matter) {
  if (!rows_matter) side.stride_row = 0;
  if (heads == 1) side.stride_head = 0;
  if (side.tokens == 1) side.stride_token = 0;
  return static_cast<uint64_t>((side.stride_row | side.stride_head | side.stride_token) * item_bytes) |
         reinterpret_cast<uintptr_t>(side.data);
}

// For checked arguments.
int cache_gather(const specprefill_gather_kv& args, CacheGather* result) {
  CacheGather& g = *result;
  const specprefill_cache &source = args.source, &target = args.target;
  const int64_t item = source.item_bytes;
  ByteDims one_head, all_heads;
  all_heads.add(source.heads, source.stride_head * item, target.stride_head * item);
  for (ByteDims* dims : {&one_head, &all_heads}) {
    dims->add(source.head_dim, source.stride_dim * item, target.stride_dim * item);
    dims->add_item(item);
  }
  // Heads that lie side by side in both are one row: a token of bthd or NHD is then copied at once.
  const bool together = all_heads.num() == 1;
  const int64_t heads = together ? 1 : source.heads;
  g.source = cache_side(source, args.block_table, args.block_table_stride, args.block_table_width);
  g.target = cache_side(target, args.target_block_table, args.target_block_table_stride, args.target_block_table_width);
  const bool packed = args.layout == SPECPREFILL_PACKED;
  const uint64_t bits = side_bits(g.source, item, heads, !packed && source.rows > 1) |
                        side_bits(g.target, item, heads, !packed && target.rows > 1);
  const ByteDims& dims = together ? all_heads : one_head;
  const int word = dims.word_bytes({bits});
  g.shape = dims.in_words(word);
  to_words(g.source, item, word);
  to_words(g.target, item, word);
  g.tiles = row_tiles(g.shape, kGatherThreads);
  g.layout = args.layout;
  g.cu_seqlens = args.cu_seqlens;
  g.indices = args.indices, g.indices_stride = args.batch > 1 ? args.indices_stride : 0;
  g.num_kept = args.num_kept;
  g.batch = static_cast<unsigned>(args.batch), g.width = static_cast<unsigned>(args.width);
  g.slot_tiles = (g.width + g.tiles.rows - 1) / g.tiles.rows;
  g.heads = static_cast<unsigned>(heads);
  const __int128 tiles = static_cast<__int128>(args.batch) * heads * g.slot_tiles * g.tiles.along;
  SPECPREFILL_REQUIRE(tiles <= kMaxSize / 2, "out: expected a cache that memory can hold, got %lld heads of %lld",
                      ll(source.heads), ll(source.head_dim));
  g.num_tiles = static_cast<unsigned>(tiles);
  return SPECPREFILL_OK;
}

}  // namespace
}  // namespace specprefill

using namespace specprefill;

int specprefill_gather_tokens_cuda(const specprefill_gather_tokens* args, void* stream) {
  return guarded("gather_tokens", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_gather_tokens, got a null pointer");
    SPECPREFILL_TRY(check_gather_tokens(*args));
    TokensGather gather;
    unsigned tiles = 0;
    SPECPREFILL_TRY(tokens_gather(*args, kGatherThreads, &gather, &tiles));
    const LaunchName name("gather_tokens_kernel(B=%lld, K=%lld, tokens of %lld words of %d bytes)", ll(args->batch),
                          ll(args->width), ll(gather.shape.words), gather.shape.word_bytes);
    return launch(name, gather_tokens_kernel, dim3(tiles), kGatherThreads, sizeof(GatherShared),
                  static_cast<cudaStream_t>(stream), gather);
  });
}

int specprefill_gather_kv_cuda(const specprefill_gather_kv* args, int64_t num_caches, void* stream) {
  return guarded("gather_kv", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_gather_kv, got a null pointer");
    SPECPREFILL_REQUIRE(num_caches == 1 || num_caches == 2, "num_caches: expected 1 or 2, got %lld", ll(num_caches));
    CacheGather gathers[2] = {};
    for (int64_t i = 0; i < num_caches; ++i) {
      SPECPREFILL_TRY(check_gather_kv(args[i]));
      SPECPREFILL_TRY(cache_gather(args[i], &gathers[i]));
    }
    const LaunchName name("gather_kv_kernel(B=%lld, K=%lld, layout %d, %lld caches, %lld heads of %lld)",
                          ll(args->batch), ll(args->width), args->layout, ll(num_caches), ll(args->source.heads),
                          ll(args->source.head_dim));
    return launch(name, gather_kv_kernel, dim3(gathers[0].num_tiles + gathers[1].num_tiles), kGatherThreads,
                  sizeof(GatherShared), static_cast<cudaStream_t>(stream), gathers[0], gathers[1]);
  });
}
