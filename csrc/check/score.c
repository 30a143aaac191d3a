/* score_layers and finalize against sums in double. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "check.h"

#define MOST_LAYERS 3

typedef struct {
  specprefill_score args;
  specprefill_layer layers[MOST_LAYERS];
  int64_t num_layers;
  int32_t *seq_lens, *cu_seqlens, *block_table, *num_look_ahead;
  float* lse[MOST_LAYERS];
  float* key_scale[MOST_LAYERS];
  double *query_values[MOST_LAYERS], *key_values[MOST_LAYERS]; /* every item of the buffers, decoded once */
} score_case;

/* Keys a sequence's buffer holds: its prompt and, for "visible", the look-ahead tokens. */
static int64_t held(const score_case* c, int64_t b) {
  return c->seq_lens[b] + (c->args.normalize_over == SPECPREFILL_OVER_VISIBLE ? c->args.look_ahead : 0);
}

static int64_t key_offset(const score_case* c, const specprefill_layer* layer, int64_t b, int64_t head, int64_t t) {
  int64_t row = b, token = t;
  if (c->args.layout == SPECPREFILL_PACKED) {
    row = 0;
    token = c->cu_seqlens[b] + t;
  } else if (c->args.layout == SPECPREFILL_PAGED) {
    row = c->block_table[b * c->args.block_table_width + t / layer->key_tokens];
    token = t % layer->key_tokens;
  }
  return row * layer->key_stride_row + head * layer->key_stride_head + token * layer->key_stride_token;
}

static double logit(const score_case* c, int which, int64_t b, int64_t n, int64_t head, int64_t t) {
  const specprefill_layer* layer = &c->layers[which];
  const int64_t kv_head = head / (layer->num_q_heads / layer->num_kv_heads);
  const int64_t query = b * layer->query_stride_batch + n * layer->query_stride_row + head * layer->query_stride_head;
  const int64_t key = key_offset(c, layer, b, kv_head, t);
  double dot = 0;
  for (int64_t d = 0; d < layer->head_dim; ++d) {
    dot += c->query_values[which][query + d * layer->query_stride_dim] *
           c->key_values[which][key + d * layer->key_stride_dim];
  }
  if (layer->key_scale != NULL) dot *= layer->key_scale[kv_head * layer->key_scale_stride];
  dot *= layer->scale;
  return c->args.softcap > 0 ? c->args.softcap * tanh(dot / c->args.softcap) : dot;
}

/* Folds one head's row into `expected` [T]. */
static void expect_row(const score_case* c, int which, int64_t b, int64_t n, int64_t head, double* expected) {
  const specprefill_layer* layer = &c->layers[which];
  const int64_t length = c->seq_lens[b], valid = c->num_look_ahead[b];
  const int look_ahead = c->args.queries == SPECPREFILL_LOOK_AHEAD;
  const int64_t position = look_ahead ? length - 1 + n : length - valid + n;
  const int visible = c->args.normalize_over == SPECPREFILL_OVER_VISIBLE && look_ahead;
  const int64_t end = visible ? length + n : (look_ahead || position + 1 > length ? length : position + 1);
  int64_t first = layer->window > 0 && position - layer->window + 1 > 0 ? position - layer->window + 1 : 0;
  if (first > end) first = end;
  double* weight = exact((length + c->args.look_ahead) * (int64_t)sizeof(double));
  memset(weight, 0, (size_t)(length + c->args.look_ahead) * sizeof(double));
  double largest = -INFINITY, sum = 0;
  for (int64_t t = first; t < end; ++t) {
    weight[t] = logit(c, which, b, n, head, t);
    if (weight[t] > largest) largest = weight[t];
  }
  for (int64_t t = first; t < end; ++t) sum += exp(weight[t] - largest);
  const double lse =
      layer->lse == NULL
          ? largest + log(sum)
          : layer->lse[b * layer->lse_stride_batch + n * layer->lse_stride_row + head * layer->lse_stride_head];
  for (int64_t t = first; t < end; ++t) weight[t] = exp(weight[t] - lse);
  const int64_t half = c->args.pool_kernel_size / 2;
  for (int64_t t = 0; t < length; ++t) {
    const int64_t low = t - half > 0 ? t - half : 0, high = t + half < length - 1 ? t + half : length - 1;
    double pooled = 0;
    for (int64_t i = low; i <= high; ++i) pooled += weight[i];
    pooled /= (double)(c->args.pool_edge == SPECPREFILL_POOL_ZERO ? c->args.pool_kernel_size : high - low + 1);
    if (pooled > expected[t]) expected[t] = pooled;
  }
  free(weight);
}

static void random_sequences(random_source* source, score_case* c) {
  specprefill_score* args = &c->args;
  args->batch = random_int(source, 1, 3);
  args->look_ahead = random_int(source, 1, 9);
  args->max_len = random_once_in(source, 4) ? random_int(source, 300, 700) : random_int(source, 1, 120);
  args->layout = (int32_t)random_int(source, 0, 2);
  args->queries = (int32_t)random_int(source, 0, 1);
  args->normalize_over = (int32_t)random_int(source, 0, 1);
  args->pool_edge = (int32_t)random_int(source, 0, 1);
  args->pool_kernel_size = random_once_in(source, 3) ? 1 + 2 * random_int(source, 0, 20) : 13;
  args->softcap = random_once_in(source, 4) ? 2.5f : 0.0f;
  if (random_once_in(source, 6)) { /* a row of weights that ends exactly where padding would */
    args->look_ahead = 8;
    args->max_len = 384;
    args->queries = SPECPREFILL_LOOK_AHEAD;
    args->normalize_over = SPECPREFILL_OVER_VISIBLE;
  }
  c->seq_lens = exact_int32(args->batch);
  c->num_look_ahead = exact_int32(args->batch);
  c->cu_seqlens = exact_int32(args->batch + 1);
  c->cu_seqlens[0] = 0;
  for (int64_t b = 0; b < args->batch; ++b) {
    c->seq_lens[b] = (int32_t)random_int(source, 1, args->max_len);
    const int64_t most = args->queries == SPECPREFILL_OBSERVATION_WINDOW && c->seq_lens[b] < args->look_ahead
                             ? c->seq_lens[b]
                             : args->look_ahead;
    c->num_look_ahead[b] = (int32_t)random_int(source, 1, most);
    c->cu_seqlens[b + 1] = (int32_t)(c->cu_seqlens[b] + held(c, b));
  }
  args->seq_lens = c->seq_lens;
  args->num_look_ahead = c->num_look_ahead;
  args->cu_seqlens = args->layout == SPECPREFILL_PACKED ? c->cu_seqlens : NULL;
}

static void* random_items(random_source* source, int32_t dtype, int64_t count, double** values) {
  void* items = exact(count * item_size(dtype));
  *values = exact(count * (int64_t)sizeof(double));
  for (int64_t i = 0; i < count; ++i) {
    write_random(source, items, dtype, i);
    (*values)[i] = read_item(items, dtype, i);
  }
  return items;
}

static void random_layer(random_source* source, score_case* c, int which, int64_t block_size, int64_t num_blocks) {
  static const int64_t head_dims[] = {1, 3, 17, 33, 64, 80, 96, 128, 192, 256};
  const specprefill_score* args = &c->args;
  specprefill_layer* layer = &c->layers[which];
  layer->num_kv_heads = random_int(source, 1, 3);
  layer->num_q_heads = layer->num_kv_heads * random_int(source, 1, 5);
  layer->head_dim = head_dims[random_int(source, 0, 9)];
  layer->scale = 1.0f / sqrtf((float)layer->head_dim);
  layer->window = random_once_in(source, 3) ? random_int(source, 1, args->max_len) : 0;

  layer->query_dtype = (int32_t)random_int(source, 0, 2);
  layer->query_stride_dim = random_once_in(source, 8) ? 2 : 1;
  layer->query_stride_head = layer->head_dim * layer->query_stride_dim;
  layer->query_stride_row = layer->query_stride_head * layer->num_q_heads;
  layer->query_stride_batch = layer->query_stride_row * args->look_ahead;
  const int64_t query_items = layer->query_stride_batch * args->batch - (layer->query_stride_dim - 1);
  layer->query = random_items(source, layer->query_dtype, query_items, &c->query_values[which]);

  layer->key_dtype = (int32_t)random_int(source, 0, 4);
  layer->key_rows = args->layout == SPECPREFILL_DENSE ? args->batch : 1;
  layer->key_tokens = args->max_len + args->look_ahead;
  if (args->layout == SPECPREFILL_PACKED) layer->key_tokens = c->cu_seqlens[args->batch];
  if (args->layout == SPECPREFILL_PAGED) {
    layer->key_rows = num_blocks;
    layer->key_tokens = block_size;
  }
  layer->key_stride_dim = random_once_in(source, 8) ? 2 : 1;
  const int64_t item = layer->head_dim * layer->key_stride_dim;
  const int tokens_first = random_once_in(source, 2);
  layer->key_stride_token = tokens_first ? item * layer->num_kv_heads : item;
  layer->key_stride_head = tokens_first ? item : item * layer->key_tokens;
  layer->key_stride_row = item * layer->num_kv_heads * layer->key_tokens;
  const int64_t key_items = layer->key_stride_row * layer->key_rows - (layer->key_stride_dim - 1);
  layer->key = random_items(source, layer->key_dtype, key_items, &c->key_values[which]);
  if (random_once_in(source, 3)) {
    layer->key_scale_stride = random_int(source, 0, 1);
    const int64_t scales = layer->key_scale_stride ? layer->num_kv_heads : 1;
    c->key_scale[which] = exact(scales * (int64_t)sizeof(float));
    for (int64_t i = 0; i < scales; ++i) c->key_scale[which][i] = 0.5f + (float)i;
    layer->key_scale = c->key_scale[which];
  }
  if (random_once_in(source, 3)) {
    layer->lse_stride_head = 1;
    layer->lse_stride_row = layer->num_q_heads;
    layer->lse_stride_batch = layer->num_q_heads * args->look_ahead;
    const int64_t rows = layer->lse_stride_batch * args->batch;
    c->lse[which] = exact(rows * (int64_t)sizeof(float));
    for (int64_t i = 0; i < rows; ++i) c->lse[which][i] = 4.0f + 0.01f * (float)(i % 100);
    layer->lse = c->lse[which];
  }
}

/* Scores on a workspace of exactly the size that the header asks for. */
static int score_on_workspace(const score_case* c, int num_threads) {
  int64_t group = 1, head_dim = 1;
  for (int64_t i = 0; i < c->num_layers; ++i) {
    const int64_t heads = c->layers[i].num_q_heads / c->layers[i].num_kv_heads;
    if (heads > group) group = heads;
    if (c->layers[i].head_dim > head_dim) head_dim = c->layers[i].head_dim;
  }
  const size_t bytes = specprefill_score_workspace_size(c->args.look_ahead, group, head_dim, c->args.max_len,
                                                        c->args.pool_kernel_size, num_threads);
  void* workspace = exact((int64_t)bytes);
  memset(workspace, 0xFF, bytes);
  const int status = specprefill_score_layers_cpu(&c->args, c->layers, c->num_layers, workspace, bytes, num_threads);
  free(workspace);
  return status;
}

static int compare(const score_case* c, const float* state, const double* expected, double relative) {
  const specprefill_score* args = &c->args;
  for (int64_t i = 0; i < args->batch * args->state_rows * args->max_len; ++i) {
    if (!(fabs(state[i] - expected[i]) <= 1e-4 * relative + relative * expected[i])) {
      return report("state[%lld]: expected %.9g, got %.9g (layout %d, T %lld, key dtype %d, D %lld)", (long long)i,
                    expected[i], (double)state[i], args->layout, (long long)args->max_len, c->layers[0].key_dtype,
                    (long long)c->layers[0].head_dim);
    }
  }
  return 0;
}

/* What earlier layers have left: a maximum goes on from there. */
static void fill_state(float* state, int64_t cells) {
  for (int64_t i = 0; i < cells; ++i) state[i] = (i % 7 == 0) ? 1.0f / 64 : 0.0f;
}

int check_score(random_source* source) {
  score_case c;
  memset(&c, 0, sizeof c);
  specprefill_score* args = &c.args;
  random_sequences(source, &c);
  const int64_t block_size = 1 << random_int(source, 0, 5);
  args->block_table_width = (args->max_len + args->look_ahead + block_size - 1) / block_size;
  args->block_table_stride = args->block_table_width;
  const int64_t num_blocks = args->batch * args->block_table_width + random_int(source, 0, 3);
  c.block_table = random_block_table(source, args->batch, args->block_table_width, num_blocks);
  args->block_table = args->layout == SPECPREFILL_PAGED ? c.block_table : NULL;
  c.num_layers = random_once_in(source, 2) ? 1 : random_int(source, 2, MOST_LAYERS);
  for (int which = 0; which < c.num_layers; ++which) random_layer(source, &c, which, block_size, num_blocks);

  args->state_rows = random_once_in(source, 4) ? 1 : args->look_ahead;
  args->state_stride_row = args->max_len;
  args->state_stride_batch = args->state_rows * args->max_len;
  const int64_t cells = args->batch * args->state_stride_batch;
  double* expected = exact(cells * (int64_t)sizeof(double));
  float* state = exact(cells * (int64_t)sizeof(float));
  float* again = exact(cells * (int64_t)sizeof(float));
  fill_state(state, cells);
  fill_state(again, cells);
  for (int64_t i = 0; i < cells; ++i) expected[i] = state[i];
  for (int which = 0; which < c.num_layers; ++which) {
    for (int64_t b = 0; b < args->batch; ++b) {
      for (int64_t n = 0; n < c.num_look_ahead[b]; ++n) {
        double* row = expected + b * args->state_stride_batch + (args->state_rows == 1 ? 0 : n) * args->max_len;
        for (int64_t head = 0; head < c.layers[which].num_q_heads; ++head) expect_row(&c, which, b, n, head, row);
      }
    }
  }
  args->state = state;
  int failed = specprefill_score_layers_cpu(args, c.layers, c.num_layers, NULL, 0, 1) != SPECPREFILL_OK;
  args->state = again;
  failed = failed || score_on_workspace(&c, 3) != SPECPREFILL_OK;
  if (failed) {
    report("score: %s", specprefill_last_error());
  } else {
    failed = compare(&c, state, expected, 1e-5);
    if (memcmp(state, again, (size_t)cells * sizeof(float)))
      failed = report("score: 1 thread, and 3 on a workspace, differ");
  }
  if (!failed && cuda_is_emulated()) {
    fill_state(again, cells);
    failed = accepted(cuda_score(args, c.layers, c.num_layers), "score on CUDA");
    if (!failed && compare(&c, again, expected, 1e-4)) failed = report("  by the CUDA kernel");
  }
  for (int which = 0; which < c.num_layers; ++which) {
    free((void*)c.layers[which].query);
    free((void*)c.layers[which].key);
    free(c.query_values[which]);
    free(c.key_values[which]);
    free(c.lse[which]);
    free(c.key_scale[which]);
  }
  free(c.seq_lens);
  free(c.num_look_ahead);
  free(c.cu_seqlens);
  free(c.block_table);
  free(expected);
  free(state);
  free(again);
  return failed;
}

static int compare_importance(const specprefill_finalize* args) {
  const int64_t half = args->pool_kernel_size / 2;
  for (int64_t i = 0; i < args->batch * args->max_len; ++i) {
    const int64_t b = i / args->max_len, t = i % args->max_len, length = args->seq_lens[b];
    const int64_t low = t - half > 0 ? t - half : 0, high = t + half < length - 1 ? t + half : length - 1;
    double expected = 0;
    for (int64_t n = 0; n < args->num_look_ahead[b] && t < length; ++n) {
      double pooled = 0;
      for (int64_t j = low; j <= high; ++j) {
        pooled += args->state[b * args->state_stride_batch + n * args->state_stride_row + j * args->state_stride_token];
      }
      pooled /= (double)(args->pool_edge == SPECPREFILL_POOL_ZERO ? args->pool_kernel_size : high - low + 1);
      if (args->reduce == SPECPREFILL_MEAN) expected += pooled / args->num_look_ahead[b];
      if (args->reduce == SPECPREFILL_MAX && pooled > expected) expected = pooled;
    }
    if (!(fabs(args->importance[i] - expected) <= 1e-5)) {
      return report("importance[%lld]: expected %.9g, got %.9g", (long long)i, expected, (double)args->importance[i]);
    }
  }
  return 0;
}

int check_finalize(random_source* source) {
  specprefill_finalize args;
  memset(&args, 0, sizeof args);
  args.batch = random_int(source, 1, 3);
  args.look_ahead = random_int(source, 1, 8);
  args.max_len = random_int(source, 1, 300);
  args.state_stride_token = random_int(source, 1, 2);
  args.state_stride_row = args.max_len * args.state_stride_token;
  args.state_stride_batch = args.state_stride_row * args.look_ahead;
  args.reduce = (int32_t)random_int(source, 0, 1);
  args.pool_edge = (int32_t)random_int(source, 0, 1);
  args.pool_kernel_size = random_once_in(source, 2) ? 1 : 13;
  const int64_t items = args.state_stride_batch * args.batch - (args.state_stride_token - 1);
  float* state = exact(items * (int64_t)sizeof(float));
  for (int64_t i = 0; i < items; ++i) state[i] = (float)random_int(source, 0, 1000) / 1000;
  int32_t* seq_lens = exact_int32(args.batch);
  int32_t* num_look_ahead = exact_int32(args.batch);
  for (int64_t b = 0; b < args.batch; ++b) {
    seq_lens[b] = (int32_t)random_int(source, 1, args.max_len);
    num_look_ahead[b] = (int32_t)random_int(source, 1, args.look_ahead);
  }
  args.state = state;
  args.seq_lens = seq_lens;
  args.num_look_ahead = num_look_ahead;
  args.importance = exact(args.batch * args.max_len * (int64_t)sizeof(float));
  memset(args.importance, 0xFF, (size_t)(args.batch * args.max_len) * sizeof(float));
  int failed = specprefill_finalize_cpu(&args, 2) != SPECPREFILL_OK;
  if (failed) {
    report("finalize: %s", specprefill_last_error());
  } else {
    failed = compare_importance(&args);
  }
  if (!failed && cuda_is_emulated()) {
    memset(args.importance, 0xFF, (size_t)(args.batch * args.max_len) * sizeof(float));
    failed = accepted(cuda_finalize(&args), "finalize on CUDA");
    if (!failed && compare_importance(&args)) failed = report("  by the CUDA kernel");
  }
  free(state);
  free(seq_lens);
  free(num_look_ahead);
  free(args.importance);
  return failed;
}
