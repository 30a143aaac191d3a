/* Score, finalize, select, gather: the whole of it on host memory. */
#include <stdlib.h>

#include "prune.h"

static int score_and_select(const prompt_batch* prompts, double keep_ratio, int threads, pruned_batch* pruned,
                            void* workspace, size_t workspace_bytes, failure* failed) {
  /* All layers at once. An engine that runs layer by layer may as well call this with one layer at a time: the state
   * is a running maximum. */
  const specprefill_score score = score_arguments(prompts, pruned->state);
  specprefill_layer layers[LAYERS];
  for (int layer = 0; layer < LAYERS; ++layer) layers[layer] = layer_arguments(prompts, layer);
  TRY(specprefill_score_layers_cpu, &score, layers, LAYERS, workspace, workspace_bytes, threads);

  const specprefill_finalize finalize = finalize_arguments(prompts, pruned);
  TRY(specprefill_finalize_cpu, &finalize, threads);

  const specprefill_select select = select_arguments(prompts, pruned, keep_ratio);
  TRY(specprefill_select_cpu, &select, threads);
  return SPECPREFILL_OK;
}

static int gather(const prompt_batch* prompts, int threads, pruned_batch* pruned, failure* failed) {
  /* The base model reads these ids at these positions. */
  const specprefill_gather_tokens tokens = gather_tokens_arguments(prompts, pruned);
  TRY(specprefill_gather_tokens_cpu, &tokens, threads);

  /* Where the model is its own speculator, what it has read need not be read again: its cache is compacted. */
  for (int layer = 0; layer < LAYERS; ++layer) {
    const specprefill_gather_kv keys =
        gather_kv_arguments(prompts, pruned, prompts->cache.keys[layer], pruned->cache.keys[layer]);
    const specprefill_gather_kv values =
        gather_kv_arguments(prompts, pruned, prompts->cache.values[layer], pruned->cache.values[layer]);
    TRY(specprefill_gather_kv_cpu, &keys, threads);
    TRY(specprefill_gather_kv_cpu, &values, threads);
  }
  return SPECPREFILL_OK;
}

int prune_cpu(const prompt_batch* prompts, double keep_ratio, int threads, pruned_batch* pruned, failure* failed) {
  /* An engine asks once, for its longest prompt, and keeps the memory. */
  const size_t bytes = specprefill_score_workspace_size(LOOK_AHEAD, Q_HEADS / KV_HEADS, HEAD_DIM, prompts->max_len,
                                                        POOL_TOKENS, threads);
  void* workspace = allocate((int64_t)bytes, 1);
  int status = score_and_select(prompts, keep_ratio, threads, pruned, workspace, bytes, failed);
  if (status == SPECPREFILL_OK) status = gather(prompts, threads, pruned, failed);
  free(workspace);
  return status;
}
