/* score_layers and finalize with arguments at the edge of what their types hold. */
#include <limits.h>
#include <math.h>
#include <string.h>

#include "check.h"

enum { DIM = 4, TOKENS = 8 };

/* A good call over two sequences of up to four tokens. */
typedef struct {
  specprefill_score args;
  specprefill_layer layer;
  float query[2 * 2 * DIM], key[TOKENS * DIM], state[2 * 2 * 4];
  int32_t seq_lens[2], cu_seqlens[3], block_table[4], num_look_ahead[2];
} small_score;

static void make(small_score* c) {
  memset(c, 0, sizeof *c);
  for (int i = 0; i < TOKENS * DIM; ++i) c->key[i] = (float)(i % 5) / 4;
  for (int i = 0; i < 4 * DIM; ++i) c->query[i] = (float)(i % 3) / 2;
  c->layer = (specprefill_layer){.query = c->query,
                                 .query_stride_batch = 2 * DIM,
                                 .query_stride_row = DIM,
                                 .query_stride_head = DIM,
                                 .query_stride_dim = 1,
                                 .key = c->key,
                                 .key_rows = 2,
                                 .key_tokens = 4,
                                 .key_stride_row = 4 * DIM,
                                 .key_stride_head = 4 * DIM,
                                 .key_stride_token = DIM,
                                 .key_stride_dim = 1,
                                 .num_q_heads = 1,
                                 .num_kv_heads = 1,
                                 .head_dim = DIM,
                                 .scale = 0.5f};
  c->args = (specprefill_score){.state = c->state,
                                .state_stride_batch = 8,
                                .state_stride_row = 4,
                                .state_rows = 2,
                                .batch = 2,
                                .look_ahead = 2,
                                .max_len = 4,
                                .pool_kernel_size = 1};
}

/* Two sequences of two tokens in blocks of two; with look-ahead keys each needs its second block too. */
static void make_paged(small_score* c) {
  static const int32_t table[] = {2, 0, 3, 1};
  make(c);
  memcpy(c->block_table, table, sizeof table);
  c->seq_lens[0] = c->seq_lens[1] = 2;
  c->args.layout = SPECPREFILL_PAGED;
  c->args.seq_lens = c->seq_lens;
  c->args.block_table = c->block_table;
  c->args.block_table_stride = c->args.block_table_width = 2;
  c->layer.key_rows = 4;
  c->layer.key_tokens = 2;
  c->layer.key_stride_row = c->layer.key_stride_head = 2 * DIM;
}

static void make_packed(small_score* c) {
  make(c);
  c->cu_seqlens[1] = 4;
  c->cu_seqlens[2] = 8;
  c->args.layout = SPECPREFILL_PACKED;
  c->args.cu_seqlens = c->cu_seqlens;
  c->layer.key_rows = 1;
  c->layer.key_tokens = TOKENS;
}

static int run(const small_score* c) { return specprefill_score_layers_cpu(&c->args, &c->layer, 1, NULL, 0, 1); }

static int run_on_cuda(const small_score* c) { return cuda_score(&c->args, &c->layer, 1); }

/* The CPU functions first, then the CUDA functions; the reason for a failure is the last call's. */
static int on_cpu;
#define SCORE(make, expected, change)                                     \
  (make(&c), (change), on_cpu = expected(run(&c), "score with " #change), \
   on_cpu + expected##_by_cuda(run_on_cuda(&c), "score on CUDA with " #change))
#define REFUSED(make, change) SCORE(make, refused, change)
#define REFUSED_CONTENTS(make, change) SCORE(make, refused_contents, change)
#define ACCEPTED(make, change) SCORE(make, accepted, change)

static int refuses_sizes(void) {
  static const int64_t bad[] = {0, -1, INT64_MIN, INT64_MAX};
  small_score c;
  int failed = 0;
  for (int i = 0; i < 4; ++i) {
    failed += REFUSED(make, c.args.batch = bad[i]);
    failed += REFUSED(make, c.args.look_ahead = bad[i]);
    failed += REFUSED(make, (c.args.state_rows = 1, c.args.look_ahead = bad[i]));
    failed += REFUSED(make, c.args.max_len = bad[i]);
    failed += REFUSED(make, c.args.state_rows = bad[i]);
    failed += REFUSED(make, c.layer.head_dim = bad[i]);
    failed += REFUSED(make, c.layer.num_kv_heads = bad[i]);
    failed += REFUSED(make, c.layer.num_q_heads = bad[i]);
    if (i == 3) break;
    failed += REFUSED(make, c.layer.key_rows = bad[i]);
    failed += REFUSED(make, c.layer.key_tokens = bad[i]);
    failed += REFUSED(make, c.args.pool_kernel_size = bad[i]);
    failed += REFUSED_CONTENTS(make_paged, c.args.block_table_width = bad[i]); /* no block holds a key */
    failed += REFUSED(make_paged, c.layer.key_tokens = bad[i]);
  }
  failed += REFUSED(make, c.args.pool_kernel_size = 2);
  failed += REFUSED(make, c.layer.window = -1);
  for (int i = 0; i < 4; ++i) { /* no answer is promised, but no arithmetic may overflow */
    (void)specprefill_score_workspace_size(bad[i], 1, DIM, 4, 1, 1);
    (void)specprefill_score_workspace_size(2, bad[i], DIM, 4, 1, 1);
    (void)specprefill_score_workspace_size(2, 1, bad[i], 4, 1, 1);
    (void)specprefill_score_workspace_size(2, 1, DIM, bad[i], 1, 1);
    (void)specprefill_score_workspace_size(2, 1, DIM, 4, bad[i], INT_MAX);
  }
  return failed;
}

static int refuses_codes_and_numbers(void) {
  static const int32_t bad[] = {7, -1, INT32_MAX, INT32_MIN};
  small_score c;
  int failed = 0;
  for (int i = 0; i < 4; ++i) {
    failed += REFUSED(make, c.args.layout = bad[i]);
    failed += REFUSED(make, c.args.queries = bad[i]);
    failed += REFUSED(make, c.args.normalize_over = bad[i]);
    failed += REFUSED(make, c.args.pool_edge = bad[i]);
    failed += REFUSED(make, c.layer.query_dtype = bad[i]);
    failed += REFUSED(make, c.layer.key_dtype = bad[i]);
  }
  failed += REFUSED(make, c.layer.query_dtype = SPECPREFILL_F8_E4M3FN);
  failed += REFUSED(make, c.args.softcap = NAN);
  failed += REFUSED(make, c.args.softcap = -1);
  failed += REFUSED(make, c.args.softcap = INFINITY);
  failed += REFUSED(make, c.layer.scale = NAN);
  failed += REFUSED(make, c.layer.scale = INFINITY);
  return failed;
}

static int refuses_memory(void) {
  small_score c;
  int failed = REFUSED(make, c.args.state = NULL);
  failed += REFUSED(make, c.layer.query = NULL);
  failed += REFUSED(make, c.layer.key = NULL);
  failed += REFUSED(make_packed, c.args.cu_seqlens = NULL);
  failed += REFUSED(make_paged, c.args.block_table = NULL);
  failed += REFUSED(make_paged, c.args.seq_lens = NULL);
  make(&c);
  failed += refused(specprefill_score_layers_cpu(NULL, &c.layer, 1, NULL, 0, 1), "score without args");
  failed += refused(specprefill_score_layers_cpu(&c.args, NULL, 1, NULL, 0, 1), "score without layers");
  for (int64_t count = -1; count <= 0; ++count) {
    failed += refused(specprefill_score_layers_cpu(&c.args, &c.layer, count, NULL, 0, 1), "score of no layer");
  }
  const size_t bytes = specprefill_score_workspace_size(2, 1, DIM, 4, 1, 1);
  char* workspace = exact((int64_t)bytes);
  failed += refused(specprefill_score_layers_cpu(&c.args, &c.layer, 1, workspace, 1, 1), "a workspace of a byte");
  failed += refused(specprefill_score_layers_cpu(&c.args, &c.layer, 1, workspace, 0, 1), "an empty workspace");
  failed += accepted(specprefill_score_layers_cpu(&c.args, &c.layer, 1, workspace, bytes, 1), "bytes enough");
  free(workspace);
  return failed;
}

static int refuses_values(void) {
  small_score c;
  int failed = ACCEPTED(make_paged, c.args.normalize_over = SPECPREFILL_OVER_VISIBLE);
  failed += ACCEPTED(make_paged, c.block_table[1] = -1); /* no key of the prompt lies there */
  failed += REFUSED_CONTENTS(make_paged, (c.args.normalize_over = SPECPREFILL_OVER_VISIBLE, c.block_table[1] = -1));
  failed += REFUSED_CONTENTS(make_paged, (c.args.normalize_over = SPECPREFILL_OVER_VISIBLE, c.block_table[3] = 4));
  failed += REFUSED_CONTENTS(make_paged, c.block_table[2] = INT32_MIN);
  failed += REFUSED_CONTENTS(make_paged, c.seq_lens[1] = 5);
  failed += REFUSED_CONTENTS(make_paged, c.seq_lens[0] = 0);
  failed += REFUSED_CONTENTS(make_paged, c.seq_lens[0] = INT32_MIN);
  failed += REFUSED_CONTENTS(make_packed, c.cu_seqlens[1] = 9);
  failed += REFUSED_CONTENTS(make_packed, c.cu_seqlens[0] = -1);
  failed += REFUSED_CONTENTS(make_packed, c.cu_seqlens[2] = 9);
  failed += REFUSED_CONTENTS(make_packed, c.cu_seqlens[2] = INT32_MIN);
  static const int32_t rows[] = {0, 3, -1, INT32_MIN};
  for (int i = 0; i < 4; ++i) {
    failed += REFUSED_CONTENTS(
        make, (c.args.num_look_ahead = c.num_look_ahead, c.num_look_ahead[0] = 1, c.num_look_ahead[1] = rows[i]));
  }
  make(&c);
  c.key[3] = NAN;
  if (run(&c) != SPECPREFILL_NOT_FINITE) failed += report("a NaN in key was accepted");
  return failed;
}

int check_score_errors(void) {
  small_score c, other;
  int failed = refuses_sizes() + refuses_codes_and_numbers() + refuses_memory() + refuses_values();
  failed += ACCEPTED(make_packed, c.args.max_len = 4);
  failed += ACCEPTED(make, c.layer.window = INT64_MAX);
  static const int threads[] = {0, -1, INT_MAX, INT_MIN};
  for (int i = 0; i < 4; ++i) {
    make(&c);
    make(&other);
    failed += accepted(run(&c), "score");
    const int status = specprefill_score_layers_cpu(&other.args, &other.layer, 1, NULL, 0, threads[i]);
    failed += accepted(status, "score on any number of threads");
    if (memcmp(c.state, other.state, sizeof c.state)) failed += report("score: %d threads differ", threads[i]);
  }
  static const int64_t widths[] = {100000001, ((int64_t)1 << 62) + 1, INT64_MAX};
  for (int i = 0; i < 6; ++i) {
    failed += ACCEPTED(make, (c.args.pool_kernel_size = widths[i / 2], c.args.pool_edge = i % 2));
    const double share = i % 2 == SPECPREFILL_POOL_ZERO ? 1 / (double)widths[i / 2] : 0.25;
    for (int t = 0; t < 16; ++t) {
      if (fabs(c.state[t] - share) > 1e-5 * share) failed += report("a window of %lld", (long long)widths[i / 2]);
    }
  }
  return failed;
}

int check_finalize_errors(void) {
  float state[12] = {0}, importance[6];
  int32_t seq_lens[2], rows[2];
  specprefill_finalize args;
  int failed = 0;
#define FINALIZE(expected, change)                                                                                    \
  (args = (specprefill_finalize){state, 6, 3, 1, 2, 2, 3, seq_lens, rows, SPECPREFILL_MEAN, SPECPREFILL_POOL_ZERO, 1, \
                                 importance},                                                                         \
   seq_lens[0] = seq_lens[1] = 3, rows[0] = rows[1] = 2, (change),                                                    \
   on_cpu = expected(specprefill_finalize_cpu(&args, 1), "finalize with " #change),                                   \
   on_cpu + expected##_by_cuda(cuda_finalize(&args), "finalize on CUDA with " #change))
  static const int64_t bad[] = {0, -1, INT64_MIN, INT64_MAX};
  for (int i = 0; i < 4; ++i) {
    const int32_t code = bad[i] == 0 ? 7 : (int32_t)(bad[i] == -1 ? -1 : i == 2 ? INT32_MIN : INT32_MAX);
    failed += FINALIZE(refused, args.reduce = code);
    failed += FINALIZE(refused, args.pool_edge = code);
    failed += FINALIZE(refused_contents, seq_lens[1] = code);
    failed += FINALIZE(refused_contents, rows[0] = code);
    if (i == 3) break; /* sizes that only the caller knows to be wrong */
    failed += FINALIZE(refused, args.batch = bad[i]);
    failed += FINALIZE(refused, args.look_ahead = bad[i]);
    failed += FINALIZE(refused, args.max_len = bad[i]);
    failed += FINALIZE(refused, args.pool_kernel_size = bad[i]);
  }
  failed += FINALIZE(refused, args.pool_kernel_size = 4);
  failed += FINALIZE(refused, args.state = NULL);
  failed += FINALIZE(refused, args.importance = NULL);
  failed += FINALIZE(accepted, args.pool_kernel_size = INT64_MAX);
  failed += FINALIZE(accepted, args.pool_edge = SPECPREFILL_POOL_VALID);
  failed += refused(specprefill_finalize_cpu(NULL, 1), "finalize without args");
  failed += accepted(specprefill_finalize_cpu(&args, 0), "finalize on 0 threads");
  failed += accepted(specprefill_finalize_cpu(&args, INT_MAX), "finalize on INT_MAX threads");
  return failed;
#undef FINALIZE
}
