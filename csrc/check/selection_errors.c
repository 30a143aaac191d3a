/* select and the gathers with arguments at the edge of what their types hold. */
#include <limits.h>
#include <math.h>
#include <string.h>

#include "check.h"

/* A good selection from two sequences of up to eight tokens. */
typedef struct {
  specprefill_select args;
  float importance[16];
  int32_t seq_lens[2], indices[16], num_kept[2];
  uint8_t overflow[2];
} small_select;

static void make_select(small_select* c) {
  memset(c, 0, sizeof *c);
  for (int i = 0; i < 16; ++i) c->importance[i] = (float)(i % 7 + 1);
  c->seq_lens[0] = 8;
  c->seq_lens[1] = 5;
  c->args = (specprefill_select){.importance = c->importance,
                                 .importance_stride_batch = 8,
                                 .importance_stride_token = 1,
                                 .batch = 2,
                                 .max_len = 8,
                                 .seq_lens = c->seq_lens,
                                 .keep = 0.5,
                                 .chunk_size = 2,
                                 .indices = c->indices,
                                 .width = 8,
                                 .num_kept = c->num_kept,
                                 .overflow = c->overflow};
}

/* The CPU functions first, then the CUDA functions; the reason for a failure is the last call's. */
static int on_cpu;
#define SELECT(expected, change)                                                                             \
  (make_select(&c), (change), on_cpu = expected(specprefill_select_cpu(&c.args, 1), "select with " #change), \
   on_cpu + expected##_by_cuda(cuda_select(&c.args), "select on CUDA with " #change))
/* Refused, and without a width. */
#define SELECT_REFUSED(change) (make_select(&c), (change), nothing_selected(&c.args, "select with " #change))

static int no_width(const specprefill_select* args, const char* what) {
  const int64_t width = specprefill_select_width(args);
  return width != -1 ? report("%s: expected a width of -1, got %lld", what, (long long)width) : 0;
}

static int nothing_selected(const specprefill_select* args, const char* what) {
  int failed = refused(specprefill_select_cpu(args, 1), what);
  failed += refused_by_cuda(cuda_select(args), what);
  return failed + no_width(args, what);
}

int check_select_errors(void) {
  small_select c;
  int failed = 0;
  static const int64_t bad[] = {0, -1, INT64_MIN};
  static const int32_t codes[] = {7, -1, INT32_MIN};
  for (int i = 0; i < 3; ++i) {
    failed += SELECT_REFUSED(c.args.chunk_size = bad[i]);
    failed += SELECT_REFUSED(c.args.max_len = bad[i]);
    failed += SELECT_REFUSED(c.args.budget = codes[i]);
    failed += SELECT_REFUSED(c.args.rounding = codes[i]);
    failed += SELECT(refused, c.args.batch = bad[i]);
    failed += SELECT(refused, c.args.width = bad[i]);
    failed += SELECT(refused_contents, c.seq_lens[1] = i == 0 ? 9 : codes[i]);
    if (bad[i] == 0) continue;
    failed += SELECT_REFUSED(c.args.sink = bad[i]);
    failed += SELECT_REFUSED(c.args.tail = bad[i]);
  }
  static const double numbers[] = {NAN, -INFINITY, 0, -1};
  for (int32_t budget = SPECPREFILL_KEEP_RATIO; budget <= SPECPREFILL_KEEP_MASS; ++budget) {
    for (int i = 0; i < 4; ++i) failed += SELECT_REFUSED((c.args.budget = budget, c.args.keep = numbers[i]));
    if (budget != SPECPREFILL_KEEP_TOKENS) failed += SELECT_REFUSED((c.args.budget = budget, c.args.keep = 1.5));
  }
  failed += SELECT(refused, c.args.importance = NULL);
  failed += SELECT(refused, c.args.indices = NULL);
  failed += SELECT(refused, c.args.num_kept = NULL);
  failed += SELECT(refused, c.args.overflow = NULL);
  failed += SELECT(refused, c.args.width = 3);
  failed += SELECT(refused, c.args.max_len = INT64_MAX);
  failed += refused(specprefill_select_cpu(NULL, 1), "select without args");
  failed += no_width(NULL, "select without args");

  failed += SELECT(accepted, (c.args.budget = SPECPREFILL_KEEP_TOKENS, c.args.keep = 1e18));
  if (c.num_kept[0] != 8 || c.num_kept[1] != 5) failed += report("1e18 tokens to keep: some are missing");
  failed += SELECT(accepted, c.args.sink = c.args.tail = INT64_MAX);
  if (c.num_kept[0] != 8 || c.num_kept[1] != 5) failed += report("all protected: some are missing");
  failed += SELECT(accepted, c.args.chunk_size = INT64_MAX);
  make_select(&c);
  failed += accepted(specprefill_select_cpu(&c.args, 0), "select on 0 threads");
  failed += accepted(specprefill_select_cpu(&c.args, INT_MAX), "select on INT_MAX threads");
  return failed;
}

typedef struct {
  specprefill_gather_tokens args;
  float x[8], values[4];
  int32_t cu_seqlens[3], indices[4], num_kept[2], offsets[3];
  int64_t position_ids[4];
} small_gather;

static void make_gather(small_gather* c) {
  static const int32_t indices[] = {0, 3, 1, 2};
  memset(c, 0, sizeof *c);
  memcpy(c->indices, indices, sizeof indices);
  c->num_kept[0] = c->num_kept[1] = 2;
  c->cu_seqlens[1] = 4;
  c->cu_seqlens[2] = 8;
  c->args = (specprefill_gather_tokens){.x = c->x,
                                        .item_bytes = 4,
                                        .batch = 2,
                                        .tokens = 4,
                                        .stride_batch = 4,
                                        .stride_token = 1,
                                        .indices = c->indices,
                                        .indices_stride = 2,
                                        .width = 2,
                                        .num_kept = c->num_kept,
                                        .values = c->values,
                                        .position_ids = c->position_ids,
                                        .offsets = c->offsets};
}

static void make_gather_packed(small_gather* c) {
  make_gather(c);
  c->args.cu_seqlens = c->cu_seqlens;
  c->args.tokens = 8;
}

#define GATHER(make, expected, change)                                                                              \
  (make(&c), (change), on_cpu = expected(specprefill_gather_tokens_cpu(&c.args, 1), "gather_tokens with " #change), \
   on_cpu + expected##_by_cuda(cuda_gather_tokens(&c.args), "gather_tokens on CUDA with " #change))

static int check_gather_tokens_errors(void) {
  small_gather c;
  int failed = GATHER(make_gather, accepted, c.args.num_outer = 0);
  failed += GATHER(make_gather_packed, accepted, c.args.num_outer = 0);
  static const int64_t bad[] = {0, -1, INT64_MIN};
  for (int i = 0; i < 3; ++i) {
    failed += GATHER(make_gather, refused, c.args.batch = bad[i]);
    failed += GATHER(make_gather, refused, c.args.width = bad[i]);
    failed += GATHER(make_gather, refused_contents, c.args.tokens = bad[i]); /* the kept ones are not there */
    failed += GATHER(make_gather, refused, c.args.item_bytes = bad[i]);
    if (bad[i] == 0) continue;
    const int32_t few = i == 1 ? -1 : INT32_MIN, many = i == 1 ? SPECPREFILL_MAX_DIMS + 1 : INT32_MAX;
    failed += GATHER(make_gather, refused, c.args.num_outer = few);
    failed += GATHER(make_gather, refused_contents, c.num_kept[1] = few);
    failed += GATHER(make_gather, refused, c.args.num_inner = few);
    failed += GATHER(make_gather, refused_contents, c.indices[3] = few);
    failed += GATHER(make_gather, refused, c.args.num_outer = many);
    failed += GATHER(make_gather, refused, c.args.num_inner = many);
    failed += GATHER(make_gather, refused, (c.args.num_outer = 1, c.args.outer_sizes[0] = bad[i]));
    failed += GATHER(make_gather, refused, (c.args.num_inner = 1, c.args.inner_sizes[0] = bad[i]));
    failed += GATHER(make_gather_packed, refused_contents, c.cu_seqlens[1] = few);
  }
  failed += GATHER(make_gather, refused_contents, c.num_kept[0] = 3);
  failed += GATHER(make_gather, refused_contents, c.indices[1] = 4);
  failed += GATHER(make_gather_packed, refused_contents, c.cu_seqlens[2] = 9);
  failed += GATHER(make_gather_packed, refused_contents, c.cu_seqlens[1] = 9);
  failed += GATHER(make_gather, refused, c.args.x = NULL);
  failed += GATHER(make_gather, refused, c.args.values = NULL);
  failed += GATHER(make_gather, refused, c.args.indices = NULL);
  failed += GATHER(make_gather, refused, c.args.num_kept = NULL);
  failed += GATHER(make_gather, refused, c.args.offsets = NULL);
  failed += GATHER(make_gather, refused, c.args.position_ids = NULL);
  failed += refused(specprefill_gather_tokens_cpu(NULL, 1), "gather_tokens without args");
  make_gather(&c);
  failed += accepted(specprefill_gather_tokens_cpu(&c.args, 0), "gather_tokens on 0 threads");
  failed += accepted(specprefill_gather_tokens_cpu(&c.args, INT_MAX), "gather_tokens on INT_MAX threads");
  return failed;
}

typedef struct {
  specprefill_gather_kv args;
  float from[32], to[32];
  int32_t cu_seqlens[3], indices[4], num_kept[2], table[4], target_table[2];
} small_kv;

static void make_kv(small_kv* c) {
  static const int32_t indices[] = {0, 3, 2, 3}, table[] = {2, 0, 3, 1}, target_table[] = {1, 0};
  memset(c, 0, sizeof *c);
  memcpy(c->indices, indices, sizeof indices);
  memcpy(c->table, table, sizeof table);
  memcpy(c->target_table, target_table, sizeof target_table);
  for (int i = 0; i < 32; ++i) c->from[i] = (float)(i + 1);
  c->num_kept[0] = c->num_kept[1] = 2;
  c->cu_seqlens[1] = 4;
  c->cu_seqlens[2] = 8;
  c->args.source = (specprefill_cache){c->from, 4, 2, 4, 1, 4, 16, 16, 4, 1};
  c->args.target = (specprefill_cache){c->to, 4, 2, 2, 1, 4, 8, 8, 4, 1};
  c->args.batch = 2;
  c->args.indices = c->indices;
  c->args.indices_stride = c->args.width = 2;
  c->args.num_kept = c->num_kept;
}

static void make_kv_packed(small_kv* c) {
  make_kv(c);
  c->args.layout = SPECPREFILL_PACKED;
  c->args.cu_seqlens = c->cu_seqlens;
  c->args.source.rows = c->args.target.rows = 1;
  c->args.source.tokens = 8;
  c->args.target.tokens = 4;
}

/* Blocks of two; the second sequence keeps nothing of its first block. */
static void make_kv_paged(small_kv* c) {
  make_kv(c);
  c->args.layout = SPECPREFILL_PAGED;
  c->args.block_table = c->table;
  c->args.block_table_stride = c->args.block_table_width = 2;
  c->args.target_block_table = c->target_table;
  c->args.target_block_table_stride = c->args.target_block_table_width = 1;
  c->args.source.rows = 4;
  c->args.source.tokens = 2;
  c->args.source.stride_row = c->args.source.stride_head = 8;
}

#define KV(make, expected, change)                                                                          \
  (make(&c), (change), on_cpu = expected(specprefill_gather_kv_cpu(&c.args, 1), "gather_kv with " #change), \
   on_cpu + expected##_by_cuda(cuda_gather_kv(&c.args, 1), "gather_kv on CUDA with " #change))

static int check_gather_kv_errors(void) {
  static const int64_t bad[] = {0, -1, INT64_MIN};
  static const int32_t codes[] = {7, -1, INT32_MIN};
  static const int32_t stray[] = {INT32_MIN, INT32_MAX};
  small_kv c;
  int failed = 0;
  for (int i = 0; i < 3; ++i) {
    failed += KV(make_kv, refused, c.args.batch = bad[i]);
    failed += KV(make_kv, refused, c.args.width = bad[i]);
    failed += KV(make_kv, refused, c.args.source.rows = bad[i]);
    failed += KV(make_kv, refused, c.args.target.rows = bad[i]);
    failed += KV(make_kv, refused, c.args.source.tokens = bad[i]);
    failed += KV(make_kv, refused, c.args.target.tokens = bad[i]);
    failed += KV(make_kv, refused, c.args.source.heads = c.args.target.heads = bad[i]);
    failed += KV(make_kv, refused, c.args.source.head_dim = c.args.target.head_dim = bad[i]);
    failed += KV(make_kv, refused, c.args.source.item_bytes = c.args.target.item_bytes = bad[i]);
    failed += KV(make_kv, refused, c.args.layout = codes[i]);
    failed += KV(make_kv, refused_contents, c.indices[1] = codes[i]);
    failed += KV(make_kv, refused_contents, c.num_kept[0] = codes[i]);
    failed += KV(make_kv_paged, refused_contents, c.table[1] = codes[i]);
    failed += KV(make_kv_paged, refused_contents, c.target_table[1] = codes[i]);
  }
  failed += KV(make_kv, refused, c.args.source.data = NULL);
  failed += KV(make_kv, refused, c.args.target.data = NULL);
  failed += KV(make_kv, refused, c.args.indices = NULL);
  failed += KV(make_kv, refused, c.args.num_kept = NULL);
  failed += KV(make_kv_packed, refused, c.args.cu_seqlens = NULL);
  failed += KV(make_kv_paged, refused, c.args.block_table = NULL);
  failed += KV(make_kv_paged, refused, c.args.target_block_table = NULL);
  failed += KV(make_kv, refused, c.args.target.heads = 2);
  failed += KV(make_kv, refused, c.args.target.head_dim = 3);
  failed += KV(make_kv, refused, c.args.target.item_bytes = 2);
  failed += KV(make_kv, refused_contents, c.args.target.tokens = 1);
  failed += KV(make_kv_packed, refused_contents, c.args.target.tokens = 3);
  failed += KV(make_kv_packed, refused_contents, c.cu_seqlens[2] = 9);
  failed += refused(specprefill_gather_kv_cpu(NULL, 1), "gather_kv without args");

  failed += KV(make_kv_packed, accepted, c.args.target.tokens = 4);
  failed += KV(make_kv_paged, accepted, c.table[2] = -1); /* holds no kept token */
  if (c.to[0] != 9) failed += report("gather_kv, paged: expected 9, got %g", (double)c.to[0]);
  failed += KV(make_kv, accepted, c.args.block_table = c.args.target_block_table = stray);
  if (c.to[0] != 1 || c.to[4] != 13) failed += report("gather_kv, dense: a stray block_table is not ignored");
  make_kv(&c);
  failed += accepted(specprefill_gather_kv_cpu(&c.args, 0), "gather_kv on 0 threads");
  failed += accepted(specprefill_gather_kv_cpu(&c.args, INT_MAX), "gather_kv on INT_MAX threads");
  return failed;
}

int check_gather_errors(void) { return check_gather_tokens_errors() + check_gather_kv_errors(); }
