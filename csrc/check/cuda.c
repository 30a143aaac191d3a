#include "cuda.h"

#include <string.h>

#if defined(SPECPREFILL_HAVE_CUDA)

int cuda_is_emulated(void) { return strcmp(specprefill_cuda_architectures(), "emulated") == 0; }

static int callable(void) { return cuda_is_emulated() || specprefill_cuda_unavailable()[0] != '\0'; }

/* 0xFF: counters and flags that a kernel expects to be zero are not. */
static void* scratch(size_t bytes) {
  void* memory = exact((int64_t)bytes);
  memset(memory, 0xFF, bytes);
  return memory;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int cuda_score(const specprefill_score* args, const specprefill_layer* layers, int64_t num_layers) {
  if (!callable()) return NOT_CALLED;
  int64_t heads = 1, kv_heads = INT64_MAX, head_dim = 1;
  for (int64_t i = 0; layers != NULL && i < num_layers; ++i) {
    heads = larger(heads, layers[i].num_q_heads);
    head_dim = larger(head_dim, layers[i].head_dim);
    if (layers[i].num_kv_heads < kv_heads) kv_heads = layers[i].num_kv_heads;
  }
  const size_t bytes =
      args == NULL ? 0
                   : specprefill_score_workspace_size_cuda(args->batch, args->look_ahead, heads, kv_heads, head_dim,
                                                           args->max_len, num_layers, args->pool_kernel_size);
  void* workspace = bytes > 0 ? scratch(bytes) : NULL;
  const int status = specprefill_score_layers_cuda(args, layers, num_layers, workspace, bytes, NULL);
  free(workspace);
  return status;
}

int cuda_finalize(const specprefill_finalize* args) {
  return callable() ? specprefill_finalize_cuda(args, NULL) : NOT_CALLED;
}

int cuda_select(const specprefill_select* args) {
  if (!callable()) return NOT_CALLED;
  const size_t bytes = args == NULL ? 0 : specprefill_select_workspace_size_cuda(args);
  void* workspace = bytes > 0 ? scratch(bytes) : NULL;
  const int status = specprefill_select_cuda(args, workspace, bytes, NULL);
  free(workspace);
  return status;
}

int cuda_select_tokens(const specprefill_finalize* finalize, const specprefill_select* select,
                       const specprefill_gather_tokens* gather) {
  if (!callable()) return NOT_CALLED;
  const size_t bytes = select == NULL ? 0 : specprefill_select_workspace_size_cuda(select);
  void* workspace = bytes > 0 ? scratch(bytes) : NULL;
  const int status = specprefill_select_tokens_cuda(finalize, select, gather, workspace, bytes, NULL);
  free(workspace);
  return status;
}

int cuda_gather_tokens(const specprefill_gather_tokens* args) {
  return callable() ? specprefill_gather_tokens_cuda(args, NULL) : NOT_CALLED;
}

int cuda_gather_kv(const specprefill_gather_kv* args, int64_t num_caches) {
  return callable() ? specprefill_gather_kv_cuda(args, num_caches, NULL) : NOT_CALLED;
}

int check_cuda(void) {
  int failed = 0;
  if (specprefill_cuda_architectures()[0] == '\0') failed += report("cuda_architectures: nothing");
  if (cuda_is_emulated() && specprefill_cuda_unavailable()[0] != '\0') {
    failed += report("the emulation: %s", specprefill_cuda_unavailable());
  }
  static const int64_t bad[] = {0, -1, INT64_MIN};
  for (int i = 0; i < 3; ++i) {
    for (int which = 0; which < 8; ++which) {
      int64_t sizes[] = {2, 8, 4, 2, 64, 100, 3, 13};
      sizes[which] = bad[i];
      if (specprefill_score_workspace_size_cuda(sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                                                sizes[7]) != 0) {
        failed += report("score_workspace_size_cuda with %lld as size %d", (long long)bad[i], which);
      }
    }
    specprefill_select select = {.batch = 2, .max_len = 100, .chunk_size = 32, .keep = 0.5};
    select.chunk_size = bad[i];
    if (specprefill_select_workspace_size_cuda(&select) != 0) failed += report("a workspace for chunks of nothing");
  }
  failed += refused_by_cuda(cuda_score(NULL, NULL, 1), "score on CUDA without args");
  failed += refused_by_cuda(cuda_finalize(NULL), "finalize on CUDA without args");
  failed += refused_by_cuda(cuda_select(NULL), "select on CUDA without args");
  failed += refused_by_cuda(cuda_select_tokens(NULL, NULL, NULL), "select_tokens on CUDA without args");
  failed += refused_by_cuda(cuda_gather_tokens(NULL), "gather_tokens on CUDA without args");
  failed += refused_by_cuda(cuda_gather_kv(NULL, 1), "gather_kv on CUDA without args");
  return failed;
}

#else

int cuda_is_emulated(void) { return 0; }

int cuda_score(const specprefill_score* args, const specprefill_layer* layers, int64_t num_layers) {
  (void)args, (void)layers, (void)num_layers;
  return NOT_CALLED;
}

int cuda_finalize(const specprefill_finalize* args) { return (void)args, NOT_CALLED; }

int cuda_select(const specprefill_select* args) { return (void)args, NOT_CALLED; }

int cuda_select_tokens(const specprefill_finalize* finalize, const specprefill_select* select,
                       const specprefill_gather_tokens* gather) {
  return (void)finalize, (void)select, (void)gather, NOT_CALLED;
}

int cuda_gather_tokens(const specprefill_gather_tokens* args) { return (void)args, NOT_CALLED; }

int cuda_gather_kv(const specprefill_gather_kv* args, int64_t num_caches) {
  return (void)args, (void)num_caches, NOT_CALLED;
}

int check_cuda(void) { return 0; }

#endif

int refused_by_cuda(int status, const char* what) { return status == NOT_CALLED ? 0 : refused(status, what); }

int accepted_by_cuda(int status, const char* what) {
  if (status == NOT_CALLED) return 0;
  if (cuda_is_emulated()) return accepted(status, what);
  if (status != SPECPREFILL_CUDA_ERROR) return report("%s: expected a CUDA error, got status %d", what, status);
  return specprefill_last_error()[0] == '\0' ? report("%s: a CUDA error without a reason", what) : 0;
}

int refused_contents_by_cuda(int status, const char* what) { return accepted_by_cuda(status, what); }
