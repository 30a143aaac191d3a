/* The same calls on device memory. An engine's prompts, queries and cache lie there anyway; here they are copied first.
 *
 * Every call only queues work: nothing waits until the results are copied back. With the workspaces given, nothing is
 * allocated either, so an engine may capture run() in a CUDA graph and replay it after it has put other keys, queries
 * and lengths into the same memory.
 */
#include <cuda_runtime_api.h>

#include "prune.h"

enum { MOST_ALLOCATIONS = 64 };

typedef struct {
  cudaStream_t stream;
  cudaError_t error; /* the first one; everything behind it does nothing */
  void* memory[MOST_ALLOCATIONS];
  int allocations;
} gpu;

static gpu open_gpu(void) {
  gpu g = {.stream = NULL};
  g.error = cudaStreamCreateWithFlags(&g.stream, cudaStreamNonBlocking);
  return g;
}

static void close_gpu(gpu* g) {
  for (int i = 0; i < g->allocations; ++i) (void)cudaFree(g->memory[i]);
  if (g->stream != NULL) (void)cudaStreamDestroy(g->stream);
}

static void* take(gpu* g, size_t bytes) {
  if (g->error != cudaSuccess) return NULL;
  if (g->allocations == MOST_ALLOCATIONS) {
    g->error = cudaErrorMemoryAllocation;
    return NULL;
  }
  void* memory = NULL;
  g->error = cudaMalloc(&memory, bytes);
  if (g->error == cudaSuccess) g->memory[g->allocations++] = memory;
  return memory;
}

static void* upload(gpu* g, const void* host, int64_t count, size_t item_bytes) {
  const size_t bytes = (size_t)count * item_bytes;
  void* memory = take(g, bytes);
  if (g->error == cudaSuccess) g->error = cudaMemcpyAsync(memory, host, bytes, cudaMemcpyHostToDevice, g->stream);
  return memory;
}

static void download(gpu* g, void* host, const void* device, int64_t count, size_t item_bytes) {
  if (g->error != cudaSuccess) return;
  g->error = cudaMemcpyAsync(host, device, (size_t)count * item_bytes, cudaMemcpyDeviceToHost, g->stream);
}

/* ---- the engine's structs with device pointers in them ---- */

static kv_cache upload_cache(gpu* g, const kv_cache* host) {
  kv_cache cache = *host;
  for (int layer = 0; layer < LAYERS; ++layer) {
    cache.keys[layer] = upload(g, host->keys[layer], host->num_blocks * items_of_block(), sizeof(bf16));
    cache.values[layer] = upload(g, host->values[layer], host->num_blocks * items_of_block(), sizeof(bf16));
  }
  cache.block_table = upload(g, host->block_table, BATCH * host->table_width, sizeof(int32_t));
  return cache;
}

static prompt_batch upload_prompts(gpu* g, const prompt_batch* host) {
  prompt_batch prompts = *host;
  prompts.seq_lens = upload(g, host->seq_lens, BATCH, sizeof(int32_t));
  prompts.num_look_ahead = upload(g, host->num_look_ahead, BATCH, sizeof(int32_t));
  prompts.token_ids = upload(g, host->token_ids, BATCH * host->max_len, sizeof(int64_t));
  for (int layer = 0; layer < LAYERS; ++layer) {
    prompts.queries[layer] = upload(g, host->queries[layer], BATCH * LOOK_AHEAD * Q_HEADS * HEAD_DIM, sizeof(bf16));
  }
  prompts.cache = upload_cache(g, &host->cache);
  return prompts;
}

static pruned_batch upload_pruned(gpu* g, const pruned_batch* host, int64_t max_len) {
  const int64_t kept = BATCH * host->width;
  pruned_batch pruned = *host;
  pruned.state = upload(g, host->state, BATCH * LOOK_AHEAD * max_len, sizeof(float)); /* zeros */
  pruned.importance = take(g, (size_t)(BATCH * max_len) * sizeof(float));
  pruned.indices = take(g, (size_t)kept * sizeof(int32_t));
  pruned.num_kept = take(g, BATCH * sizeof(int32_t));
  pruned.overflow = take(g, BATCH * sizeof(uint8_t));
  pruned.token_ids = take(g, (size_t)kept * sizeof(int64_t));
  pruned.position_ids = take(g, (size_t)kept * sizeof(int64_t));
  pruned.cu_seqlens = take(g, (BATCH + 1) * sizeof(int32_t));
  pruned.cache = upload_cache(g, &host->cache);
  return pruned;
}

static void download_pruned(gpu* g, pruned_batch* host, const pruned_batch* device, int64_t max_len) {
  const int64_t kept = BATCH * host->width;
  download(g, host->importance, device->importance, BATCH * max_len, sizeof(float));
  download(g, host->indices, device->indices, kept, sizeof(int32_t));
  download(g, host->num_kept, device->num_kept, BATCH, sizeof(int32_t));
  download(g, host->overflow, device->overflow, BATCH, sizeof(uint8_t));
  download(g, host->token_ids, device->token_ids, kept, sizeof(int64_t));
  download(g, host->position_ids, device->position_ids, kept, sizeof(int64_t));
  download(g, host->cu_seqlens, device->cu_seqlens, BATCH + 1, sizeof(int32_t));
  for (int layer = 0; layer < LAYERS; ++layer) {
    const int64_t items = host->cache.num_blocks * items_of_block();
    download(g, host->cache.keys[layer], device->cache.keys[layer], items, sizeof(bf16));
    download(g, host->cache.values[layer], device->cache.values[layer], items, sizeof(bf16));
  }
}

/* ---- the calls ---- */

typedef struct {
  void *score, *select;
  size_t score_bytes, select_bytes;
} workspaces;

static workspaces take_workspaces(gpu* g, int64_t max_len, const specprefill_select* select) {
  workspaces found = {.score_bytes = specprefill_score_workspace_size_cuda(BATCH, LOOK_AHEAD, Q_HEADS, KV_HEADS,
                                                                           HEAD_DIM, max_len, LAYERS, POOL_TOKENS),
                      .select_bytes = specprefill_select_workspace_size_cuda(select)};
  found.score = take(g, found.score_bytes);
  found.select = take(g, found.select_bytes);
  return found;
}

/* The structs lie in host memory and need not outlive a call; the pointers in them are device memory. */
static int run(const prompt_batch* prompts, double keep_ratio, pruned_batch* pruned, const workspaces* scratch,
               cudaStream_t stream, failure* failed) {
  const specprefill_score score = score_arguments(prompts, pruned->state);
  specprefill_layer layers[LAYERS];
  for (int layer = 0; layer < LAYERS; ++layer) layers[layer] = layer_arguments(prompts, layer);
  TRY(specprefill_score_layers_cuda, &score, layers, LAYERS, scratch->score, scratch->score_bytes, stream);

  /* Finalize, select and gather tokens in one call. */
  const specprefill_finalize finalize = finalize_arguments(prompts, pruned);
  const specprefill_select select = select_arguments(prompts, pruned, keep_ratio);
  const specprefill_gather_tokens tokens = gather_tokens_arguments(prompts, pruned);
  TRY(specprefill_select_tokens_cuda, &finalize, &select, &tokens, scratch->select, scratch->select_bytes, stream);

  for (int layer = 0; layer < LAYERS; ++layer) {
    const specprefill_gather_kv keys_and_values[] = {
        gather_kv_arguments(prompts, pruned, prompts->cache.keys[layer], pruned->cache.keys[layer]),
        gather_kv_arguments(prompts, pruned, prompts->cache.values[layer], pruned->cache.values[layer]),
    };
    TRY(specprefill_gather_kv_cuda, keys_and_values, 2, stream);
  }
  return SPECPREFILL_OK;
}

int prune_cuda(const prompt_batch* prompts, double keep_ratio, pruned_batch* pruned, failure* failed) {
  gpu g = open_gpu();
  const prompt_batch there = upload_prompts(&g, prompts);
  pruned_batch result = upload_pruned(&g, pruned, prompts->max_len);
  const specprefill_select select = select_arguments(prompts, NULL, keep_ratio);
  const workspaces scratch = take_workspaces(&g, prompts->max_len, &select);
  int status = SPECPREFILL_OK;
  if (g.error == cudaSuccess) status = run(&there, keep_ratio, &result, &scratch, g.stream, failed);
  if (status == SPECPREFILL_OK) {
    download_pruned(&g, pruned, &result, prompts->max_len);
    /* A kernel that fails while it runs is reported here, by whoever waits first. */
    if (g.error == cudaSuccess) g.error = cudaStreamSynchronize(g.stream);
    if (g.error != cudaSuccess) {
      *failed = (failure){.call = "CUDA", .reason = cudaGetErrorString(g.error)};
      status = SPECPREFILL_CUDA_ERROR;
    }
  }
  close_gpu(&g);
  return status;
}
