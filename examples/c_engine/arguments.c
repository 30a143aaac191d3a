/* Strides count elements. What an initializer leaves out is 0 or NULL, the default of every option. */
#include "arguments.h"

#include <math.h>

specprefill_score score_arguments(const prompt_batch* prompts, float* state) {
  return (specprefill_score){
      .state = state,
      .state_stride_batch = LOOK_AHEAD * prompts->max_len,
      .state_stride_row = prompts->max_len,
      .state_rows = LOOK_AHEAD,
      .batch = BATCH,
      .look_ahead = LOOK_AHEAD,
      .max_len = prompts->max_len,
      .layout = SPECPREFILL_PAGED,
      .seq_lens = prompts->seq_lens,
      .block_table = prompts->cache.block_table,
      .block_table_stride = prompts->cache.table_width,
      .block_table_width = prompts->cache.table_width,
      .num_look_ahead = prompts->num_look_ahead,
      .queries = SPECPREFILL_LOOK_AHEAD,
      .normalize_over = SPECPREFILL_OVER_PROMPT,
      .pool_edge = SPECPREFILL_POOL_ZERO,
      .pool_kernel_size = POOL_TOKENS,
  };
}

specprefill_layer layer_arguments(const prompt_batch* prompts, int layer) {
  return (specprefill_layer){
      .query = prompts->queries[layer],
      .query_dtype = SPECPREFILL_BF16,
      .query_stride_batch = LOOK_AHEAD * Q_HEADS * HEAD_DIM,
      .query_stride_row = Q_HEADS * HEAD_DIM,
      .query_stride_head = HEAD_DIM,
      .query_stride_dim = 1,
      .key = prompts->cache.keys[layer],
      .key_dtype = SPECPREFILL_BF16,
      .key_rows = prompts->cache.num_blocks, /* paged: a row is a block */
      .key_tokens = BLOCK_TOKENS,
      .key_stride_row = items_of_block(),
      .key_stride_token = KV_HEADS * HEAD_DIM,
      .key_stride_head = HEAD_DIM,
      .key_stride_dim = 1,
      .num_q_heads = Q_HEADS,
      .num_kv_heads = KV_HEADS,
      .head_dim = HEAD_DIM,
      .scale = 1.0f / sqrtf(HEAD_DIM),
  };
}

specprefill_finalize finalize_arguments(const prompt_batch* prompts, const pruned_batch* pruned) {
  return (specprefill_finalize){
      .state = pruned->state,
      .state_stride_batch = LOOK_AHEAD * prompts->max_len,
      .state_stride_row = prompts->max_len,
      .state_stride_token = 1,
      .batch = BATCH,
      .look_ahead = LOOK_AHEAD,
      .max_len = prompts->max_len,
      .seq_lens = prompts->seq_lens,
      .num_look_ahead = prompts->num_look_ahead,
      .reduce = SPECPREFILL_MEAN,
      .pool_kernel_size = 1, /* the scores are pooled already */
      .importance = pruned->importance,
  };
}

specprefill_select select_arguments(const prompt_batch* prompts, const pruned_batch* pruned, double keep_ratio) {
  specprefill_select args = {
      .importance_stride_batch = prompts->max_len,
      .importance_stride_token = 1,
      .batch = BATCH,
      .max_len = prompts->max_len,
      .seq_lens = prompts->seq_lens,
      .budget = SPECPREFILL_KEEP_RATIO,
      .keep = keep_ratio,
      .chunk_size = CHUNK_TOKENS,
      .rounding = SPECPREFILL_CEIL,
      .tail = TAIL_TOKENS,
  };
  if (pruned != NULL) {
    args.importance = pruned->importance;
    args.indices = pruned->indices;
    args.width = pruned->width;
    args.num_kept = pruned->num_kept;
    args.overflow = pruned->overflow;
  }
  return args;
}

specprefill_gather_tokens gather_tokens_arguments(const prompt_batch* prompts, const pruned_batch* pruned) {
  return (specprefill_gather_tokens){
      .x = prompts->token_ids,
      .item_bytes = sizeof(int64_t),
      .batch = BATCH,
      .tokens = prompts->max_len,
      .stride_batch = prompts->max_len,
      .stride_token = 1, /* no outer and no inner dimensions: an id is a number; an embedding has inner ones */
      .indices = pruned->indices,
      .indices_stride = pruned->width,
      .width = pruned->width,
      .num_kept = pruned->num_kept,
      .values = pruned->token_ids,
      .position_ids = pruned->position_ids,
      .offsets = pruned->cu_seqlens,
  };
}

static specprefill_cache cache_arguments(const kv_cache* cache, const bf16* data) {
  return (specprefill_cache){
      .data = data,
      .item_bytes = sizeof(bf16),
      .rows = cache->num_blocks,
      .tokens = BLOCK_TOKENS,
      .heads = KV_HEADS,
      .head_dim = HEAD_DIM,
      .stride_row = items_of_block(),
      .stride_token = KV_HEADS * HEAD_DIM,
      .stride_head = HEAD_DIM,
      .stride_dim = 1,
  };
}

specprefill_gather_kv gather_kv_arguments(const prompt_batch* prompts, const pruned_batch* pruned, const bf16* from,
                                          bf16* to) {
  return (specprefill_gather_kv){
      .source = cache_arguments(&prompts->cache, from),
      .target = cache_arguments(&pruned->cache, to),
      .layout = SPECPREFILL_PAGED,
      .batch = BATCH,
      .block_table = prompts->cache.block_table,
      .block_table_stride = prompts->cache.table_width,
      .block_table_width = prompts->cache.table_width,
      .target_block_table = pruned->cache.block_table,
      .target_block_table_stride = pruned->cache.table_width,
      .target_block_table_width = pruned->cache.table_width,
      .indices = pruned->indices,
      .indices_stride = pruned->width,
      .width = pruned->width,
      .num_kept = pruned->num_kept,
  };
}
