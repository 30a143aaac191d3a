/* The whole tail in one call on CUDA, in the emulation: equal to finalize, select and gather_tokens on the CPU. */
#include <string.h>

#include "check.h"

typedef struct {
  specprefill_finalize finalize;
  specprefill_select select;
  specprefill_gather_tokens gather;
} tail_call;

typedef struct {
  float* importance;
  int32_t *indices, *num_kept, *offsets;
  uint8_t* overflow;
  int64_t *values, *position_ids;
} tail_results;

/* Results full of what no call writes, put into the arguments. */
static tail_results make_results(tail_call* call) {
  const int64_t batch = call->select.batch, cells = batch * call->select.max_len, kept = batch * call->select.width;
  const tail_results made = {.importance = exact(cells * (int64_t)sizeof(float)),
                             .indices = exact_int32(kept),
                             .num_kept = exact_int32(batch),
                             .offsets = exact_int32(batch + 1),
                             .overflow = exact(batch),
                             .values = exact(kept * (int64_t)sizeof(int64_t)),
                             .position_ids = exact(kept * (int64_t)sizeof(int64_t))};
  memset(made.importance, 0xFF, (size_t)cells * sizeof(float));
  memset(made.indices, 0x7F, (size_t)kept * sizeof(int32_t));
  memset(made.values, 0x7F, (size_t)kept * sizeof(int64_t));
  memset(made.position_ids, 0x7F, (size_t)kept * sizeof(int64_t));
  call->finalize.importance = made.importance;
  call->select.importance = made.importance;
  call->select.indices = made.indices;
  call->select.num_kept = made.num_kept;
  call->select.overflow = made.overflow;
  call->gather.indices = made.indices;
  call->gather.num_kept = made.num_kept;
  call->gather.values = made.values;
  call->gather.position_ids = made.position_ids;
  call->gather.offsets = made.offsets;
  return made;
}

static void free_results(tail_results* made) {
  free(made->importance);
  free(made->indices);
  free(made->num_kept);
  free(made->offsets);
  free(made->overflow);
  free(made->values);
  free(made->position_ids);
}

static int compare(const tail_call* call, const tail_results* a, const tail_results* b, int with_gather) {
  const size_t batch = (size_t)call->select.batch, kept = batch * (size_t)call->select.width;
  if (memcmp(a->importance, b->importance, batch * (size_t)call->select.max_len * sizeof(float))) {
    return report("select_tokens: importance differs");
  }
  if (memcmp(a->indices, b->indices, kept * sizeof(int32_t)) || memcmp(a->overflow, b->overflow, batch) ||
      memcmp(a->num_kept, b->num_kept, batch * sizeof(int32_t))) {
    return report("select_tokens: selection differs");
  }
  if (with_gather && (memcmp(a->values, b->values, kept * sizeof(int64_t)) ||
                      memcmp(a->position_ids, b->position_ids, kept * sizeof(int64_t)) ||
                      memcmp(a->offsets, b->offsets, (batch + 1) * sizeof(int32_t)))) {
    return report("select_tokens: packed tokens differ");
  }
  return 0;
}

/* One maximum or mean over a power of two of sixteenths: exact in any order. */
static tail_call random_call(random_source* source, float** state, int32_t** seq_lens, int64_t** ids) {
  tail_call call;
  memset(&call, 0, sizeof call);
  const int64_t batch = random_int(source, 1, 4), rows = (int64_t)1 << random_int(source, 0, 3);
  const int64_t max_len = random_once_in(source, 4) ? random_int(source, 2000, 9000) : random_int(source, 1, 600);
  const int64_t cells = batch * rows * max_len;
  *state = exact(cells * (int64_t)sizeof(float));
  for (int64_t i = 0; i < cells; ++i) (*state)[i] = (float)random_int(source, 1, 500) / 16;
  *seq_lens = exact_int32(batch);
  for (int64_t b = 0; b < batch; ++b) (*seq_lens)[b] = (int32_t)random_int(source, 1, max_len);
  *ids = exact(batch * max_len * (int64_t)sizeof(int64_t));
  for (int64_t i = 0; i < batch * max_len; ++i) (*ids)[i] = (int64_t)random_bits(source);
  call.finalize = (specprefill_finalize){.state = *state,
                                         .state_stride_batch = rows * max_len,
                                         .state_stride_row = max_len,
                                         .state_stride_token = 1,
                                         .batch = batch,
                                         .look_ahead = rows,
                                         .max_len = max_len,
                                         .seq_lens = *seq_lens,
                                         .reduce = (int32_t)random_int(source, 0, 1),
                                         .pool_kernel_size = 1};
  call.select = (specprefill_select){.importance_stride_batch = max_len,
                                     .importance_stride_token = 1,
                                     .batch = batch,
                                     .max_len = max_len,
                                     .seq_lens = *seq_lens,
                                     .budget = (int32_t)random_int(source, 0, 2),
                                     .keep = (double)random_int(source, 1, 20) / 20,
                                     .chunk_size = random_int(source, 1, 40),
                                     .sink = random_int(source, 0, 5),
                                     .tail = random_int(source, 0, 5)};
  if (call.select.budget == SPECPREFILL_KEEP_TOKENS) call.select.keep = (double)random_int(source, 1, max_len);
  call.select.width = specprefill_select_width(&call.select);
  call.gather = (specprefill_gather_tokens){.x = *ids,
                                            .item_bytes = sizeof(int64_t),
                                            .batch = batch,
                                            .tokens = max_len,
                                            .stride_batch = max_len,
                                            .stride_token = 1,
                                            .indices_stride = call.select.width,
                                            .width = call.select.width};
  return call;
}

int check_select_tokens(random_source* source) {
  float* state;
  int32_t* seq_lens;
  int64_t* ids;
  tail_call call = random_call(source, &state, &seq_lens, &ids);
  tail_results expected = make_results(&call);
  int failed = accepted(specprefill_finalize_cpu(&call.finalize, 1), "finalize") +
               accepted(specprefill_select_cpu(&call.select, 1), "select") +
               accepted(specprefill_gather_tokens_cpu(&call.gather, 1), "gather_tokens");
  const int with_gather = !random_once_in(source, 4);
  const specprefill_gather_tokens* gather = with_gather ? &call.gather : NULL;
  tail_results found = make_results(&call);
  failed += accepted(specprefill_select_tokens_cpu(&call.finalize, &call.select, gather, (int)random_int(source, 1, 3)),
                     "select_tokens");
  if (!failed) failed = compare(&call, &found, &expected, with_gather);
  free_results(&found);
  if (!failed && cuda_is_emulated()) {
    found = make_results(&call);
    failed += accepted(cuda_select_tokens(&call.finalize, &call.select, gather), "select_tokens on CUDA");
    if (!failed) failed = compare(&call, &found, &expected, with_gather);
    free_results(&found);
  }
  free_results(&expected);
  free(state);
  free(seq_lens);
  free(ids);
  return failed;
}
