/* Independent of the library: this file does not include its header.
 *
 * Scores are compared within rounding. Selections must be exactly those that the definition makes from the library's
 * own importance, and what is gathered must be equal byte for byte.
 */
#include "reference.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- importance ---- */

static void softmax(double* x, int64_t count) {
  double largest = x[0], sum = 0;
  for (int64_t i = 1; i < count; ++i) largest = fmax(largest, x[i]);
  for (int64_t i = 0; i < count; ++i) sum += x[i] = exp(x[i] - largest);
  for (int64_t i = 0; i < count; ++i) x[i] /= sum;
}

/* Mean of the POOL_TOKENS values around t; those outside of the prompt count as zero. */
static double pooled(const double* x, int64_t count, int64_t t) {
  double sum = 0;
  for (int64_t i = t - POOL_TOKENS / 2; i <= t + POOL_TOKENS / 2; ++i) {
    if (i >= 0 && i < count) sum += x[i];
  }
  return sum / POOL_TOKENS;
}

/* The keys of one KV head of a prompt as doubles [tokens, HEAD_DIM]. */
static void read_keys(const prompt_batch* prompts, int layer, int64_t b, int kv_head, double* keys) {
  for (int64_t t = 0; t < prompts->seq_lens[b]; ++t) {
    const bf16* key = prompts->cache.keys[layer] + token_offset(&prompts->cache, b, t) + kv_head * HEAD_DIM;
    for (int d = 0; d < HEAD_DIM; ++d) keys[t * HEAD_DIM + d] = bf16_to_float(key[d]);
  }
}

/* best[n, t] = max over layers and heads of the pooled attention of look-ahead row n. */
static void expect_state(const prompt_batch* prompts, int64_t b, double* best) {
  const int64_t length = prompts->seq_lens[b];
  double* keys = allocate(length * HEAD_DIM, sizeof(double));
  double* weights = allocate(length, sizeof(double));
  for (int layer = 0; layer < LAYERS; ++layer) {
    for (int head = 0; head < Q_HEADS; ++head) {
      if (head % (Q_HEADS / KV_HEADS) == 0) read_keys(prompts, layer, b, head / (Q_HEADS / KV_HEADS), keys);
      for (int64_t n = 0; n < prompts->num_look_ahead[b]; ++n) {
        const bf16* query = prompts->queries[layer] + ((b * LOOK_AHEAD + n) * Q_HEADS + head) * HEAD_DIM;
        for (int64_t t = 0; t < length; ++t) {
          double dot = 0;
          for (int d = 0; d < HEAD_DIM; ++d) dot += bf16_to_float(query[d]) * keys[t * HEAD_DIM + d];
          weights[t] = dot / sqrt(HEAD_DIM);
        }
        softmax(weights, length);
        for (int64_t t = 0; t < length; ++t)
          best[n * length + t] = fmax(best[n * length + t], pooled(weights, length, t));
      }
    }
  }
  free(keys);
  free(weights);
}

static int compare_importance(const prompt_batch* prompts, const pruned_batch* pruned, int64_t b) {
  const int64_t length = prompts->seq_lens[b], rows = prompts->num_look_ahead[b];
  double* best = allocate(rows * length, sizeof(double));
  expect_state(prompts, b, best);
  int failed = 0;
  for (int64_t t = 0; t < prompts->max_len && !failed; ++t) {
    double expected = 0; /* behind the prompt's end */
    for (int64_t n = 0; n < rows && t < length; ++n) expected += best[n * length + t] / (double)rows;
    const double got = pruned->importance[b * prompts->max_len + t];
    if (!(fabs(got - expected) <= 1e-7 + 1e-4 * expected)) { /* NaN fails too */
      fprintf(stderr, "importance[%lld, %lld]: expected %.9g, got %.9g\n", (long long)b, (long long)t, expected, got);
      failed = 1;
    }
  }
  free(best);
  return failed;
}

/* ---- selection ---- */

/* keep[c]: whether chunk c stays. Returns whether the protected ones are more than the budget. */
static int expect_chunks(const float* importance, int64_t length, double keep_ratio, uint8_t* keep) {
  const int64_t chunks = (length + CHUNK_TOKENS - 1) / CHUNK_TOKENS;
  const int64_t wanted = (int64_t)ceil((keep_ratio - 1e-9) * (double)chunks); /* 0.7 of 10 is 7, not 8 */
  const int64_t budget = wanted > 1 ? wanted : 1;
  float* mean = allocate(chunks, sizeof(float));
  int64_t kept = 0;
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t start = c * CHUNK_TOKENS, end = start + CHUNK_TOKENS < length ? start + CHUNK_TOKENS : length;
    double sum = 0;
    for (int64_t t = start; t < end; ++t) sum += importance[t];
    mean[c] = (float)(sum / (double)(end - start));
    keep[c] = end > length - TAIL_TOKENS; /* holds a protected token */
    kept += keep[c];
  }
  const int overflow = kept > budget;
  for (; kept < budget; ++kept) {
    int64_t best = -1;
    for (int64_t c = 0; c < chunks; ++c) {
      if (!keep[c] && (best < 0 || mean[c] > mean[best])) best = c; /* of equal ones the first */
    }
    keep[best] = 1;
  }
  free(mean);
  return overflow;
}

static int compare_selection(const prompt_batch* prompts, const pruned_batch* pruned, int64_t b, double keep_ratio) {
  const int64_t length = prompts->seq_lens[b];
  uint8_t* keep = allocate(length / CHUNK_TOKENS + 1, 1);
  const int overflow = expect_chunks(pruned->importance + b * prompts->max_len, length, keep_ratio, keep);
  const int32_t* indices = pruned->indices + b * pruned->width;
  int64_t kept = 0;
  int same = pruned->overflow[b] == overflow;
  for (int64_t t = 0; t < length; ++t) {
    if (!keep[t / CHUNK_TOKENS]) continue;
    same = same && kept < pruned->width && indices[kept] == t;
    ++kept;
  }
  same = same && pruned->num_kept[b] == kept;
  for (int64_t i = kept; i < pruned->width; ++i) same = same && indices[i] == -1;
  if (!same) fprintf(stderr, "selection of prompt %lld: not the best chunks\n", (long long)b);
  free(keep);
  return !same;
}

/* ---- what is gathered ---- */

static int compare_tokens(const prompt_batch* prompts, const pruned_batch* pruned) {
  int64_t at = 0;
  int same = pruned->cu_seqlens[0] == 0;
  for (int64_t b = 0; b < BATCH; ++b) {
    for (int64_t i = 0; i < pruned->num_kept[b]; ++i, ++at) {
      const int64_t t = pruned->indices[b * pruned->width + i];
      same = same && pruned->position_ids[at] == t &&
             pruned->token_ids[at] == prompts->token_ids[b * prompts->max_len + t];
    }
    same = same && pruned->cu_seqlens[b + 1] == at;
  }
  for (; at < BATCH * pruned->width; ++at) same = same && pruned->position_ids[at] == 0 && pruned->token_ids[at] == 0;
  if (!same) fprintf(stderr, "packed tokens: not the kept ones in order\n");
  return !same;
}

static int compare_caches(const prompt_batch* prompts, const pruned_batch* pruned) {
  const size_t bytes = KV_HEADS * HEAD_DIM * sizeof(bf16);
  int same = 1;
  for (int64_t b = 0; b < BATCH; ++b) {
    for (int64_t i = 0; i < pruned->num_kept[b]; ++i) {
      const int64_t from = token_offset(&prompts->cache, b, pruned->indices[b * pruned->width + i]);
      const int64_t to = token_offset(&pruned->cache, b, i);
      for (int layer = 0; layer < LAYERS; ++layer) {
        same = same && !memcmp(pruned->cache.keys[layer] + to, prompts->cache.keys[layer] + from, bytes) &&
               !memcmp(pruned->cache.values[layer] + to, prompts->cache.values[layer] + from, bytes);
      }
    }
  }
  if (!same) fprintf(stderr, "compacted cache: not the kept tokens' keys and values\n");
  return !same;
}

int compare_with_reference(const prompt_batch* prompts, const pruned_batch* pruned, double keep_ratio) {
  int importance = 0, selection = 0;
  for (int64_t b = 0; b < BATCH; ++b) {
    importance |= compare_importance(prompts, pruned, b);
    selection |= compare_selection(prompts, pruned, b, keep_ratio);
  }
  /* What is gathered is looked up through the selection, so that has to be right first. */
  if (selection) return importance + selection;
  return importance + compare_tokens(prompts, pruned) + compare_caches(prompts, pruned);
}
