/* The stand-in for an engine and its model. Nothing here calls the library. */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void* allocate(int64_t count, size_t item_bytes) {
  void* memory = calloc(count > 0 ? (size_t)count : 1, item_bytes);
  if (memory == NULL) {
    fprintf(stderr, "c_engine: out of memory: %lld items of %zu bytes\n", (long long)count, item_bytes);
    exit(1);
  }
  return memory;
}

/* ---- numbers ---- */

static uint64_t random_bits(uint64_t* state) {
  uint64_t x = *state += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

static int64_t random_below(uint64_t* state, int64_t end) { return (int64_t)(random_bits(state) % (uint64_t)end); }

/* Mean 0, variance 1: the sum of four 16-bit numbers is normal enough. */
static float random_normal(uint64_t* state) {
  const uint64_t bits = random_bits(state);
  float sum = 0;
  for (int i = 0; i < 4; ++i) sum += (float)(bits >> (16 * i) & 0xFFFF) / 65536.0f;
  return (sum - 2.0f) * 1.7320508f;
}

static bf16 to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return (bf16)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16); /* to nearest even */
}

float bf16_to_float(bf16 x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* ---- the cache ---- */

/* Room for `tokens` tokens of every prompt. Blocks go out in random order, as they do in an engine that has run for a
 * while; the last ones stay free. */
static kv_cache make_cache(int64_t tokens) {
  kv_cache cache = {.table_width = blocks_for(tokens)};
  const int64_t used = BATCH * cache.table_width;
  cache.num_blocks = used + 2;
  for (int layer = 0; layer < LAYERS; ++layer) {
    cache.keys[layer] = allocate(cache.num_blocks * items_of_block(), sizeof(bf16));
    cache.values[layer] = allocate(cache.num_blocks * items_of_block(), sizeof(bf16));
  }
  cache.block_table = allocate(used, sizeof(int32_t));
  uint64_t random = 7;
  for (int64_t i = 0; i < used; ++i) {
    const int64_t j = random_below(&random, i + 1);
    cache.block_table[i] = cache.block_table[j];
    cache.block_table[j] = (int32_t)i;
  }
  return cache;
}

static void free_cache(kv_cache* cache) {
  for (int layer = 0; layer < LAYERS; ++layer) {
    free(cache->keys[layer]);
    free(cache->values[layer]);
  }
  free(cache->block_table);
}

int64_t token_offset(const kv_cache* cache, int64_t prompt, int64_t token) {
  const int64_t block = cache->block_table[prompt * cache->table_width + token / BLOCK_TOKENS];
  return block * items_of_block() + token % BLOCK_TOKENS * (KV_HEADS * HEAD_DIM);
}

/* ---- the model ---- */

int64_t fact_position(int64_t prompt_tokens, int fact) {
  const int64_t chunks = prompt_tokens / CHUNK_TOKENS;
  if (chunks < 2 * FACTS) return -1;
  return chunks * (2 * fact + 1) / (2 * FACTS) * CHUNK_TOKENS + (CHUNK_TOKENS - FACT_TOKENS) / 2;
}

/* A fact is looked at by the heads of one group in one layer only: that is why scores are the maximum over heads. */
static int looks_at(int layer, int kv_head, int fact) { return layer == fact % LAYERS && kv_head == fact % KV_HEADS; }

static int64_t fact_at(int64_t prompt_tokens, int64_t token, int layer, int kv_head) {
  for (int fact = 0; fact < FACTS; ++fact) {
    const int64_t start = fact_position(prompt_tokens, fact);
    if (start >= 0 && token >= start && token < start + FACT_TOKENS && looks_at(layer, kv_head, fact)) return 1;
  }
  return 0;
}

/* Queries of a group lie around one direction; a fact's keys do too, and all others lie anywhere. */
static void run_layer(prompt_batch* prompts, int layer, uint64_t* random) {
  float direction[KV_HEADS][HEAD_DIM];
  for (int i = 0; i < KV_HEADS * HEAD_DIM; ++i) direction[i / HEAD_DIM][i % HEAD_DIM] = random_normal(random);

  const int64_t rows = (int64_t)BATCH * LOOK_AHEAD;
  prompts->queries[layer] = allocate(rows * Q_HEADS * HEAD_DIM, sizeof(bf16));
  for (int64_t i = 0; i < rows * Q_HEADS * HEAD_DIM; ++i) {
    const int64_t head = i / HEAD_DIM % Q_HEADS;
    const float around = direction[head / (Q_HEADS / KV_HEADS)][i % HEAD_DIM];
    prompts->queries[layer][i] = to_bf16(around + 0.5f * random_normal(random));
  }
  for (int64_t b = 0; b < BATCH; ++b) {
    for (int64_t t = 0; t < prompts->seq_lens[b]; ++t) {
      const int64_t offset = token_offset(&prompts->cache, b, t);
      bf16 *key = prompts->cache.keys[layer] + offset, *value = prompts->cache.values[layer] + offset;
      for (int i = 0; i < KV_HEADS * HEAD_DIM; ++i) {
        const int kv_head = i / HEAD_DIM;
        const float anywhere = random_normal(random);
        key[i] = to_bf16(fact_at(prompts->seq_lens[b], t, layer, kv_head)
                             ? direction[kv_head][i % HEAD_DIM] + 0.5f * anywhere
                             : anywhere);
        value[i] = to_bf16(random_normal(random));
      }
    }
  }
}

prompt_batch make_prompts(int64_t tokens) {
  prompt_batch prompts = {.max_len = tokens};
  prompts.seq_lens = allocate(BATCH, sizeof(int32_t));
  prompts.num_look_ahead = allocate(BATCH, sizeof(int32_t));
  prompts.token_ids = allocate(BATCH * tokens, sizeof(int64_t));
  prompts.cache = make_cache(tokens);
  uint64_t random = 1;
  for (int64_t b = 0; b < BATCH; ++b) {
    prompts.seq_lens[b] = (int32_t)(b == 0 ? tokens : (tokens + 1) / 2);
    prompts.num_look_ahead[b] = b == 0 ? LOOK_AHEAD : LOOK_AHEAD - 3; /* the model ended the second one's text early */
    for (int64_t t = 0; t < prompts.seq_lens[b]; ++t) prompts.token_ids[b * tokens + t] = random_below(&random, 50000);
  }
  for (int layer = 0; layer < LAYERS; ++layer) run_layer(&prompts, layer, &random);
  return prompts;
}

void free_prompts(prompt_batch* prompts) {
  for (int layer = 0; layer < LAYERS; ++layer) free(prompts->queries[layer]);
  free_cache(&prompts->cache);
  free(prompts->seq_lens);
  free(prompts->num_look_ahead);
  free(prompts->token_ids);
}

/* ---- what is left ---- */

pruned_batch make_pruned(int64_t max_len, int64_t width) {
  pruned_batch pruned = {.width = width};
  pruned.state = allocate(BATCH * LOOK_AHEAD * max_len, sizeof(float)); /* zeros: nothing has been seen yet */
  pruned.importance = allocate(BATCH * max_len, sizeof(float));
  pruned.indices = allocate(BATCH * width, sizeof(int32_t));
  pruned.num_kept = allocate(BATCH, sizeof(int32_t));
  pruned.overflow = allocate(BATCH, sizeof(uint8_t));
  pruned.token_ids = allocate(BATCH * width, sizeof(int64_t));
  pruned.position_ids = allocate(BATCH * width, sizeof(int64_t));
  pruned.cu_seqlens = allocate(BATCH + 1, sizeof(int32_t));
  pruned.cache = make_cache(width);
  return pruned;
}

void free_pruned(pruned_batch* pruned) {
  free(pruned->state);
  free(pruned->importance);
  free(pruned->indices);
  free(pruned->num_kept);
  free(pruned->overflow);
  free(pruned->token_ids);
  free(pruned->position_ids);
  free(pruned->cu_seqlens);
  free_cache(&pruned->cache);
}
