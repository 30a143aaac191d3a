/* What an inference engine has when it comes to prune prompts: a batch of prompts that its small model has read, the
 * model's paged KV cache, and the queries of the few tokens that the model then wrote. Random numbers stand in for the
 * model here, except for a few planted facts that it looked at.
 */
#ifndef C_ENGINE_ENGINE_H
#define C_ENGINE_ENGINE_H

#include <stddef.h>
#include <stdint.h>

/* The model: all layers alike, four query heads for each KV head. */
enum { LAYERS = 3, Q_HEADS = 8, KV_HEADS = 2, HEAD_DIM = 64 };
/* The engine: two prompts at a time, eight tokens written after each, blocks of 16 tokens in the cache. */
enum { BATCH = 2, LOOK_AHEAD = 8, BLOCK_TOKENS = 16 };
/* The pruning: chunks of 32 tokens; a prompt's last 16 tokens hold the question and always survive. */
enum { CHUNK_TOKENS = 32, TAIL_TOKENS = 16, POOL_TOKENS = 13 };
/* The facts that are planted in a prompt, each this many tokens long. */
enum { FACTS = 3, FACT_TOKENS = 8 };

typedef uint16_t bf16;

/* Keys and values of all layers. A block is [BLOCK_TOKENS, KV_HEADS, HEAD_DIM] ("NHD"); the same blocks in every layer
 * belong to a prompt, so one table serves them all. */
typedef struct {
  int64_t num_blocks, table_width;
  bf16* keys[LAYERS];   /* [num_blocks, BLOCK_TOKENS, KV_HEADS, HEAD_DIM] */
  bf16* values[LAYERS]; /* the same */
  int32_t* block_table; /* [BATCH, table_width] */
} kv_cache;

typedef struct {
  int64_t max_len;
  int32_t* seq_lens;       /* [BATCH] tokens of each prompt */
  int32_t* num_look_ahead; /* [BATCH] tokens that were written before the model stopped, at most LOOK_AHEAD */
  int64_t* token_ids;      /* [BATCH, max_len] */
  bf16* queries[LAYERS];   /* [BATCH, LOOK_AHEAD, Q_HEADS, HEAD_DIM], after the rotary embedding, as the keys are */
  kv_cache cache;
} prompt_batch;

/* What is left of the prompts. Sizes follow from the options alone, so all of it can be allocated beforehand. */
typedef struct {
  int64_t width;         /* the most tokens that a prompt keeps */
  float* state;          /* [BATCH, LOOK_AHEAD, max_len] */
  float* importance;     /* [BATCH, max_len] */
  int32_t* indices;      /* [BATCH, width] kept positions, -1 behind them */
  int32_t* num_kept;     /* [BATCH] */
  uint8_t* overflow;     /* [BATCH] the protected tokens alone are more than the budget */
  int64_t* token_ids;    /* [BATCH * width] the kept ones of all prompts, one after the other */
  int64_t* position_ids; /* [BATCH * width] where each of them was: what its rotary embedding is made from */
  int32_t* cu_seqlens;   /* [BATCH + 1] each prompt's start in the two above */
  kv_cache cache;        /* the kept tokens' keys and values, in new blocks */
} pruned_batch;

static inline int64_t items_of_block(void) { return (int64_t)BLOCK_TOKENS * KV_HEADS * HEAD_DIM; }
static inline int64_t blocks_for(int64_t tokens) { return (tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

/* Memory that is zero, or the end of the program. */
void* allocate(int64_t count, size_t item_bytes);

float bf16_to_float(bf16 x);

/* Where in a cache's keys and values the token's first KV head begins. */
int64_t token_offset(const kv_cache* cache, int64_t prompt, int64_t token);

/* The first prompt has `tokens` tokens, the second half of them. */
prompt_batch make_prompts(int64_t tokens);
void free_prompts(prompt_batch* prompts);

/* The first token of a planted fact, or -1: prompts of few chunks have none. */
int64_t fact_position(int64_t prompt_tokens, int fact);

pruned_batch make_pruned(int64_t max_len, int64_t width);
void free_pruned(pruned_batch* pruned);

#endif
