/* gather_tokens and gather_kv, byte for byte. */
#include <string.h>

#include "check.h"

typedef struct {
  int32_t *indices, *num_kept, *seq_lens, *cu_seqlens;
  int64_t batch, max_len, width;
} kept_tokens;

static kept_tokens random_kept(random_source* source) {
  kept_tokens kept = {.batch = random_int(source, 1, 3), .max_len = random_int(source, 1, 200)};
  kept.width = random_int(source, 1, kept.max_len);
  kept.indices = exact_int32(kept.batch * kept.width);
  kept.num_kept = exact_int32(kept.batch);
  kept.seq_lens = exact_int32(kept.batch);
  kept.cu_seqlens = exact_int32(kept.batch + 1);
  kept.cu_seqlens[0] = 0;
  for (int64_t b = 0; b < kept.batch; ++b) {
    kept.seq_lens[b] = (int32_t)random_int(source, 1, kept.max_len);
    kept.cu_seqlens[b + 1] = kept.cu_seqlens[b] + kept.seq_lens[b];
    int32_t count = 0;
    for (int32_t t = 0; t < kept.seq_lens[b] && count < kept.width; ++t) {
      if (random_once_in(source, 2)) kept.indices[b * kept.width + count++] = t;
    }
    kept.num_kept[b] = count;
    for (int64_t i = count; i < kept.width; ++i) kept.indices[b * kept.width + i] = -1;
  }
  return kept;
}

static void free_kept(kept_tokens* kept) {
  free(kept->indices);
  free(kept->num_kept);
  free(kept->seq_lens);
  free(kept->cu_seqlens);
}

static uint8_t* random_bytes(random_source* source, int64_t count) {
  uint8_t* bytes = exact(count);
  for (int64_t i = 0; i < count; ++i) bytes[i] = (uint8_t)random_int(source, 1, 255);
  return bytes;
}

static int compare_tokens(const specprefill_gather_tokens* args, const kept_tokens* kept) {
  const int64_t inner = args->inner_sizes[0];
  int64_t start = 0;
  for (int64_t b = 0; b <= args->batch; ++b) {
    if (args->offsets[b] != start) {
      return report("offsets[%lld]: expected %lld, got %d", (long long)b, (long long)start, args->offsets[b]);
    }
    for (int64_t i = 0; b < args->batch && i < kept->num_kept[b]; ++i) {
      const int64_t t = kept->indices[b * kept->width + i], row = start + i;
      if (args->position_ids[row] != t)
        return report("position_ids[%lld]: expected %lld", (long long)row, (long long)t);
      const int64_t token = args->cu_seqlens != NULL ? (kept->cu_seqlens[b] + t) * args->stride_token
                                                     : b * args->stride_batch + t * args->stride_token;
      for (int64_t outer = 0; outer < args->outer_sizes[0]; ++outer) {
        for (int64_t j = 0; j < inner; ++j) {
          const int64_t from = outer * args->outer_strides[0] + token + j * args->inner_strides[0];
          const int64_t to = (outer * args->batch * args->width + row) * inner + j;
          if (memcmp((const char*)args->x + from * args->item_bytes, (char*)args->values + to * args->item_bytes,
                     (size_t)args->item_bytes)) {
            return report("values[%lld, %lld, %lld] differs", (long long)outer, (long long)row, (long long)j);
          }
        }
      }
    }
    if (b < args->batch) start += kept->num_kept[b];
  }
  for (int64_t outer = 0; outer < args->outer_sizes[0]; ++outer) {
    const int64_t from = (outer * args->batch * args->width + start) * inner * args->item_bytes;
    const int64_t to = (outer + 1) * args->batch * args->width * inner * args->item_bytes;
    for (int64_t i = from; i < to; ++i) {
      if (((uint8_t*)args->values)[i]) return report("values: expected zeros behind token %lld", (long long)start);
    }
  }
  for (int64_t row = start; row < args->batch * args->width; ++row) {
    if (args->position_ids[row]) return report("position_ids: expected zeros behind token %lld", (long long)start);
  }
  return 0;
}

int check_gather_tokens(random_source* source) {
  kept_tokens kept = random_kept(source);
  const int packed = random_once_in(source, 2);
  specprefill_gather_tokens args;
  memset(&args, 0, sizeof args);
  args.item_bytes = (int64_t)1 << random_int(source, 0, 3);
  args.batch = kept.batch;
  args.tokens = packed ? kept.cu_seqlens[kept.batch] : kept.max_len;
  args.num_outer = args.num_inner = 1;
  args.outer_sizes[0] = random_int(source, 1, 3);
  args.inner_sizes[0] = random_int(source, 1, 40);
  args.inner_strides[0] = random_int(source, 1, 2);
  args.stride_token = args.inner_sizes[0] * args.inner_strides[0];
  args.stride_batch = args.stride_token * args.tokens;
  args.outer_strides[0] = packed ? args.stride_batch : args.stride_batch * args.batch;
  const int64_t items = args.outer_strides[0] * args.outer_sizes[0] - (args.inner_strides[0] - 1);
  uint8_t* x = random_bytes(source, items * args.item_bytes);
  args.x = x;
  args.cu_seqlens = packed ? kept.cu_seqlens : NULL;
  args.indices = kept.indices;
  args.indices_stride = args.width = kept.width;
  args.num_kept = kept.num_kept;
  const int64_t rows = kept.batch * kept.width;
  args.values = random_bytes(source, args.outer_sizes[0] * rows * args.inner_sizes[0] * args.item_bytes);
  args.position_ids = exact(rows * (int64_t)sizeof(int64_t));
  args.offsets = exact_int32(args.batch + 1);
  memset(args.position_ids, 0xFF, (size_t)rows * sizeof(int64_t));
  int failed = specprefill_gather_tokens_cpu(&args, 2) != SPECPREFILL_OK;
  if (failed) {
    report("gather_tokens: %s", specprefill_last_error());
  } else {
    failed = compare_tokens(&args, &kept);
  }
  if (!failed && cuda_is_emulated()) {
    memset(args.values, 0x7F, (size_t)(args.outer_sizes[0] * rows * args.inner_sizes[0] * args.item_bytes));
    memset(args.position_ids, 0x7F, (size_t)rows * sizeof(int64_t));
    memset(args.offsets, 0x7F, (size_t)(args.batch + 1) * sizeof(int32_t));
    failed = accepted(cuda_gather_tokens(&args), "gather_tokens on CUDA");
    if (!failed && compare_tokens(&args, &kept)) failed = report("  by the CUDA kernel");
  }
  free(x);
  free(args.values);
  free(args.position_ids);
  free(args.offsets);
  free_kept(&kept);
  return failed;
}

/* Sizes and strides of one cache; returns its bytes. */
static int64_t shape_cache(random_source* source, specprefill_cache* cache) {
  const int tokens_first = random_once_in(source, 2);
  cache->stride_dim = random_once_in(source, 6) ? 2 : 1;
  const int64_t item = cache->head_dim * cache->stride_dim;
  cache->stride_token = tokens_first ? item * cache->heads : item;
  cache->stride_head = tokens_first ? item : item * cache->tokens;
  cache->stride_row = item * cache->heads * cache->tokens;
  return (cache->stride_row * cache->rows - (cache->stride_dim - 1)) * cache->item_bytes;
}

static int64_t place(const specprefill_cache* cache, int32_t layout, const int32_t* starts, const int32_t* table,
                     int64_t table_width, int64_t b, int64_t t) {
  int64_t row = b, token = t;
  if (layout == SPECPREFILL_PACKED) {
    row = 0;
    token = starts[b] + t;
  } else if (layout == SPECPREFILL_PAGED) {
    row = table[b * table_width + t / cache->tokens];
    token = t % cache->tokens;
  }
  return row * cache->stride_row + token * cache->stride_token;
}

static int compare_kv(const specprefill_gather_kv* args, const kept_tokens* kept, uint8_t* untouched, int64_t bytes) {
  const int64_t size = args->source.item_bytes;
  int32_t starts[4] = {0};
  for (int64_t b = 0; b < kept->batch; ++b) starts[b + 1] = starts[b] + kept->num_kept[b];
  /* `untouched` is the target as it was: put the kept tokens in, and the whole must be equal. */
  for (int64_t b = 0; b < kept->batch; ++b) {
    for (int64_t i = 0; i < kept->num_kept[b]; ++i) {
      const int64_t from = place(&args->source, args->layout, kept->cu_seqlens, args->block_table,
                                 args->block_table_width, b, kept->indices[b * kept->width + i]);
      const int64_t to =
          place(&args->target, args->layout, starts, args->target_block_table, args->target_block_table_width, b, i);
      for (int64_t j = 0; j < args->source.heads * args->source.head_dim; ++j) {
        const int64_t head = j / args->source.head_dim, d = j % args->source.head_dim;
        memcpy(untouched + (to + head * args->target.stride_head + d * args->target.stride_dim) * size,
               (const char*)args->source.data +
                   (from + head * args->source.stride_head + d * args->source.stride_dim) * size,
               (size_t)size);
      }
    }
  }
  return memcmp(untouched, args->target.data, (size_t)bytes)
             ? report("gather_kv: layout %d differs, or a byte behind the kept tokens changed", args->layout)
             : 0;
}

int check_gather_kv(random_source* source) {
  kept_tokens kept = random_kept(source);
  specprefill_gather_kv args;
  memset(&args, 0, sizeof args);
  args.layout = (int32_t)random_int(source, 0, 2);
  args.batch = kept.batch;
  args.source.item_bytes = (int64_t)1 << random_int(source, 0, 2);
  args.source.heads = random_int(source, 1, 4);
  args.source.head_dim = random_int(source, 1, 130);
  args.source.rows = kept.batch;
  args.source.tokens = kept.max_len;
  args.target = args.source;
  args.target.tokens = kept.width;
  if (args.layout == SPECPREFILL_PACKED) {
    args.source.rows = args.target.rows = 1;
    args.source.tokens = kept.cu_seqlens[kept.batch];
    args.target.tokens = kept.batch * kept.width;
  } else if (args.layout == SPECPREFILL_PAGED) {
    const int64_t block = random_int(source, 1, 40);
    args.source.tokens = args.target.tokens = block;
    args.block_table_width = args.block_table_stride = (kept.max_len + block - 1) / block;
    args.target_block_table_width = args.target_block_table_stride = (kept.width + block - 1) / block;
    args.source.rows = kept.batch * args.block_table_width + 2;
    args.target.rows = kept.batch * args.target_block_table_width + 1;
  }
  int32_t* table = random_block_table(source, kept.batch, args.block_table_width, args.source.rows);
  int32_t* target_table = random_block_table(source, kept.batch, args.target_block_table_width, args.target.rows);
  if (args.layout == SPECPREFILL_PACKED) args.cu_seqlens = kept.cu_seqlens;
  if (args.layout == SPECPREFILL_PAGED) {
    args.block_table = table;
    args.target_block_table = target_table;
  }
  args.indices = kept.indices;
  args.indices_stride = args.width = kept.width;
  args.num_kept = kept.num_kept;
  args.source.data = random_bytes(source, shape_cache(source, &args.source));
  const int64_t bytes = shape_cache(source, &args.target);
  uint8_t* target = random_bytes(source, bytes);
  uint8_t* before = exact(bytes);
  uint8_t* untouched = exact(bytes);
  memcpy(before, target, (size_t)bytes);
  memcpy(untouched, target, (size_t)bytes);
  args.target.data = target;
  int failed = specprefill_gather_kv_cpu(&args, 2) != SPECPREFILL_OK;
  if (failed) {
    report("gather_kv: %s", specprefill_last_error());
  } else {
    failed = compare_kv(&args, &kept, untouched, bytes);
  }
  if (!failed && cuda_is_emulated()) {
    uint8_t* other = exact(bytes); /* both caches in one call */
    specprefill_gather_kv both[] = {args, args};
    both[1].target.data = other;
    memcpy(target, before, (size_t)bytes);
    memcpy(other, before, (size_t)bytes);
    failed = accepted(cuda_gather_kv(both, 2), "gather_kv on CUDA");
    for (int i = 0; i < 2 && !failed; ++i) {
      memcpy(untouched, before, (size_t)bytes);
      if (compare_kv(&both[i], &kept, untouched, bytes)) failed = report("  by the CUDA kernel, cache %d", i);
    }
    free(other);
  }
  free((void*)args.source.data);
  free(target);
  free(untouched);
  free(before);
  free(table);
  free(target_table);
  free_kept(&kept);
  return failed;
}
