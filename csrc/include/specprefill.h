/* The C interface of specprefill: raw pointers, int64 sizes and strides, no Python, no torch.
 *
 * Every function returns a specprefill_status; on failure specprefill_last_error() says, for the calling thread, which
 * argument is wrong, what was expected and what came. Strides count elements of the tensor they belong to unless a name
 * ends in _bytes; they may be 0 or negative. Pointers of the *_cpu functions are host memory; scratch memory and
 * tensors need no alignment beyond their element's. Fields named after an enum take its constants.
 *
 * num_threads: at most this many threads of one pool per process; below 1 counts as 1. Calls may be made from several
 * threads at once: one uses the pool, the others run on their own thread. A forked child starts a pool of its own.
 *
 * After INVALID_ARGUMENT or OUT_OF_MEMORY outputs are untouched; after NOT_FINITE they are undefined. Definitions: Liu,
 * Chen, Zhang, "Speculative Prefill", ICML 2025 (arXiv 2502.02789).
 */
#ifndef SPECPREFILL_H
#define SPECPREFILL_H

#include <stddef.h>
#include <stdint.h>

#define SPECPREFILL_VERSION "0.1.0"
#define SPECPREFILL_MAX_DIMS 8

#if defined(_WIN32)
#define SPECPREFILL_API
#else
#define SPECPREFILL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  SPECPREFILL_OK = 0,
  SPECPREFILL_INVALID_ARGUMENT = 1,
  SPECPREFILL_NOT_FINITE = 2, /* NaN or Inf where the definition has no answer */
  SPECPREFILL_OUT_OF_MEMORY = 3,
  SPECPREFILL_CUDA_ERROR = 4 /* the message names the kernel, its shapes and CUDA's own error */
} specprefill_status;

typedef enum {
  SPECPREFILL_F32 = 0,
  SPECPREFILL_F16 = 1,
  SPECPREFILL_BF16 = 2,
  SPECPREFILL_F8_E4M3FN = 3,
  SPECPREFILL_F8_E5M2 = 4
} specprefill_dtype;

/* Where a sequence's tokens lie in a key or value buffer. */
typedef enum {
  SPECPREFILL_DENSE = 0,  /* one row of tokens per sequence */
  SPECPREFILL_PACKED = 1, /* one row of tokens for all; cu_seqlens gives each sequence's start */
  SPECPREFILL_PAGED = 2   /* blocks of tokens; block_table names the blocks of each sequence */
} specprefill_layout;

typedef enum { SPECPREFILL_LOOK_AHEAD = 0, SPECPREFILL_OBSERVATION_WINDOW = 1 } specprefill_queries;
typedef enum { SPECPREFILL_OVER_PROMPT = 0, SPECPREFILL_OVER_VISIBLE = 1 } specprefill_normalize_over;
typedef enum { SPECPREFILL_POOL_ZERO = 0, SPECPREFILL_POOL_VALID = 1 } specprefill_pool_edge;
typedef enum { SPECPREFILL_MEAN = 0, SPECPREFILL_MAX = 1 } specprefill_reduce;
typedef enum { SPECPREFILL_CEIL = 0, SPECPREFILL_FLOOR = 1 } specprefill_rounding;
typedef enum { SPECPREFILL_KEEP_RATIO = 0, SPECPREFILL_KEEP_TOKENS = 1, SPECPREFILL_KEEP_MASS = 2 } specprefill_budget;

/* Why the last call on this thread failed; "" if it did not. Valid until this thread's next call. */
SPECPREFILL_API const char* specprefill_last_error(void);

/* "avx512", "avx2" or "generic": which code this processor runs. SPECPREFILL_INSTRUCTION_SET in the environment
 * is an upper bound. */
SPECPREFILL_API const char* specprefill_instruction_set(void);

/* ---- score ---- */

typedef struct {
  const void* query; /* [B, N, Hq, D]; F32, F16 or BF16; post-RoPE */
  int32_t query_dtype;
  int64_t query_stride_batch, query_stride_row, query_stride_head, query_stride_dim;
  const void* key; /* post-RoPE; any dtype */
  int32_t key_dtype;
  int64_t key_rows;       /* dense: B; packed: 1; paged: number of blocks */
  int64_t key_tokens;     /* tokens in each row: T, sum of T, block size */
  int64_t key_stride_row; /* from one sequence (dense) or block (paged) to the next */
  int64_t key_stride_head, key_stride_token, key_stride_dim;
  const float* key_scale;   /* a key's value is the stored one times this; NULL: 1 */
  int64_t key_scale_stride; /* between KV heads; 0: one for all */
  const float* lse;         /* [B, N, Hq] natural log of each row's sum of exponentials; NULL: computed */
  int64_t lse_stride_batch, lse_stride_row, lse_stride_head;
  int64_t num_q_heads, num_kv_heads, head_dim;
  int64_t window; /* the row at position p sees keys after p - window only; 0: all */
  float scale;    /* on the dot product */
} specprefill_layer;

typedef struct {
  float* state; /* [B, state_rows, T], tokens contiguous; running maximum, updated in place */
  int64_t state_stride_batch, state_stride_row;
  int64_t state_rows; /* look_ahead, or 1: the maximum over rows is folded too */
  int64_t batch, look_ahead, max_len;
  int32_t layout;             /* specprefill_layout, of every layer's key */
  const int32_t* seq_lens;    /* [B] prompt lengths; NULL: max_len, or from cu_seqlens */
  const int32_t* cu_seqlens;  /* [B + 1], packed only */
  const int32_t* block_table; /* [B, block_table_width], paged only */
  int64_t block_table_stride, block_table_width;
  const int32_t* num_look_ahead;   /* [B] valid rows; NULL: look_ahead */
  int32_t queries, normalize_over; /* specprefill_queries, specprefill_normalize_over */
  int32_t pool_edge;               /* specprefill_pool_edge */
  int64_t pool_kernel_size;        /* odd; 1: no pooling */
  float softcap;                   /* 0: none */
} specprefill_score;

/* Least scratch memory for layers of at most these sizes, in bytes. group = num_q_heads / num_kv_heads. 0: a size is
 * not possible. */
SPECPREFILL_API size_t specprefill_score_workspace_size(int64_t look_ahead, int64_t group, int64_t head_dim,
                                                        int64_t max_len, int64_t pool_kernel_size, int num_threads);

/* Folds each layer's attention into args->state: QK^T, softmax, pooling, maximum over heads.
 * workspace NULL: allocated for the call. The result does not depend on num_threads or the workspace, bit for bit. */
SPECPREFILL_API int specprefill_score_layers_cpu(const specprefill_score* args, const specprefill_layer* layers,
                                                 int64_t num_layers, void* workspace, size_t workspace_bytes,
                                                 int num_threads);

/* ---- finalize ---- */

typedef struct {
  const float* state; /* [B, N, T] */
  int64_t state_stride_batch, state_stride_row, state_stride_token;
  int64_t batch, look_ahead, max_len;
  const int32_t* seq_lens;       /* NULL: max_len */
  const int32_t* num_look_ahead; /* NULL: look_ahead */
  int32_t reduce, pool_edge;
  int64_t pool_kernel_size; /* 1: no pooling */
  float* importance;        /* [B, T] contiguous; 0 from a sequence's length on */
} specprefill_finalize;

SPECPREFILL_API int specprefill_finalize_cpu(const specprefill_finalize* args, int num_threads);

/* ---- select ---- */

typedef struct {
  const float* importance; /* [B, T] */
  int64_t importance_stride_batch, importance_stride_token;
  int64_t batch, max_len;
  const int32_t* seq_lens; /* NULL: max_len */
  const uint8_t* protect;  /* [B, T] nonzero: must survive; NULL: none */
  int64_t protect_stride_batch, protect_stride_token;
  int32_t budget; /* specprefill_budget */
  double keep;    /* the ratio, the number of tokens, or the mass */
  int64_t chunk_size;
  int32_t rounding;
  int64_t sink, tail;
  int32_t* indices; /* [B, width] kept positions ascending, -1 behind */
  int64_t width;    /* specprefill_select_width() or more */
  int32_t* num_kept;
  uint8_t* overflow; /* 1: protected chunks alone exceed the budget */
} specprefill_select;

/* Tokens that any selection of these arguments fits into; sizes, budget and whether protect is NULL are read. -1: an
 * argument is wrong. */
SPECPREFILL_API int64_t specprefill_select_width(const specprefill_select* args);

SPECPREFILL_API int specprefill_select_cpu(const specprefill_select* args, int num_threads);

/* ---- gather ---- */

/* Packs the kept tokens of x [outer dims..., B, T, inner dims...] into values [outer..., B * width, inner...]. */
typedef struct {
  const void* x;
  int64_t item_bytes; /* of one element */
  int64_t batch, tokens;
  int64_t stride_batch, stride_token;
  int32_t num_outer, num_inner;
  int64_t outer_sizes[SPECPREFILL_MAX_DIMS], outer_strides[SPECPREFILL_MAX_DIMS];
  int64_t inner_sizes[SPECPREFILL_MAX_DIMS], inner_strides[SPECPREFILL_MAX_DIMS];
  const int32_t* cu_seqlens; /* [B + 1]: x is packed [outer..., sum T, inner...], stride_batch is not read; or NULL */
  const int32_t* indices;    /* [B, width] */
  int64_t indices_stride, width;
  const int32_t* num_kept; /* [B] */
  void* values;            /* contiguous; zeros behind the last kept token */
  int64_t* position_ids;   /* [B * width]; zeros behind */
  int32_t* offsets;        /* [B + 1] start of each sequence in values */
} specprefill_gather_tokens;

SPECPREFILL_API int specprefill_gather_tokens_cpu(const specprefill_gather_tokens* args, int num_threads);

/* From the state to packed tokens: finalize's importance is select's input, select's indices are gather's. gather may
 * be NULL. */
SPECPREFILL_API int specprefill_select_tokens_cpu(const specprefill_finalize* finalize,
                                                  const specprefill_select* select,
                                                  const specprefill_gather_tokens* gather, int num_threads);

/* One cache, key or value, with the meaning of the same fields in specprefill_layer. */
typedef struct {
  const void* data;
  int64_t item_bytes;
  int64_t rows, tokens, heads, head_dim;
  int64_t stride_row, stride_head, stride_token, stride_dim;
} specprefill_cache;

typedef struct {
  specprefill_cache source, target; /* target.data is written; the same layout, heads, head_dim and item_bytes */
  int32_t layout;
  int64_t batch;
  const int32_t* cu_seqlens;  /* of source, packed only; the target's sequences follow each other */
  const int32_t* block_table; /* of source, paged only */
  int64_t block_table_stride, block_table_width;
  const int32_t* target_block_table; /* paged only */
  int64_t target_block_table_stride, target_block_table_width;
  const int32_t* indices; /* [B, width] */
  int64_t indices_stride, width;
  const int32_t* num_kept; /* [B] */
} specprefill_gather_kv;

/* Copies the kept tokens; what lies behind them in target stays as it is. source and target must not overlap. */
SPECPREFILL_API int specprefill_gather_kv_cpu(const specprefill_gather_kv* args, int num_threads);

/* ---- CUDA ----
 *
 * The same ops on the calling thread's current device, in builds that have them. The argument structs and the array of
 * layers lie in host memory and may be changed as soon as a call returns; every pointer inside them is device memory.
 * Calls queue their work on `stream` (a cudaStream_t; NULL: the default stream) and return: they never wait, never read
 * device memory on the host, and allocate nothing when a workspace is given, so that CUDA graphs can capture them; call
 * once before, as the first use of a kernel loads it. workspace NULL: taken from the device's memory pool, in stream
 * order. A workspace needs no initial contents and may be used again by the next call on the same stream.
 *
 * Sizes, strides, enums and options are checked as in the _cpu functions. Contents of device memory are not: lengths
 * are clamped to their buffers, positions and blocks outside of them count as absent, a sequence of length 0 keeps
 * nothing, and NaN stays NaN; with lse, one weight that is not finite may mark 32 positions around it. Nothing is read
 * or written outside the buffers that the arguments describe.
 */

/* "" where the current device can run the kernels of this build, else why it cannot. Valid until this thread's next
 * call. */
SPECPREFILL_API const char* specprefill_cuda_unavailable(void);

/* What the kernels were compiled for, as in "sm_80 sm_90 compute_120". */
SPECPREFILL_API const char* specprefill_cuda_architectures(void);

/* Enough for any layers of at most these sizes and at least num_kv_heads KV heads. 0: a size is not possible. */
SPECPREFILL_API size_t specprefill_score_workspace_size_cuda(int64_t batch, int64_t look_ahead, int64_t num_q_heads,
                                                             int64_t num_kv_heads, int64_t head_dim, int64_t max_len,
                                                             int64_t layers, int64_t pool_kernel_size);
SPECPREFILL_API int specprefill_score_layers_cuda(const specprefill_score* args, const specprefill_layer* layers,
                                                  int64_t num_layers, void* workspace, size_t workspace_bytes,
                                                  void* stream);

SPECPREFILL_API int specprefill_finalize_cuda(const specprefill_finalize* args, void* stream);

/* For specprefill_select_cuda and specprefill_select_tokens_cuda; sizes and budget are read. 0: one is not possible. */
SPECPREFILL_API size_t specprefill_select_workspace_size_cuda(const specprefill_select* args);
SPECPREFILL_API int specprefill_select_cuda(const specprefill_select* args, void* workspace, size_t workspace_bytes,
                                            void* stream);

SPECPREFILL_API int specprefill_gather_tokens_cuda(const specprefill_gather_tokens* args, void* stream);

/* num_caches: 1, or 2 for keys and values in one launch. */
SPECPREFILL_API int specprefill_gather_kv_cuda(const specprefill_gather_kv* args, int64_t num_caches, void* stream);

/* As specprefill_select_tokens_cpu. */
SPECPREFILL_API int specprefill_select_tokens_cuda(const specprefill_finalize* finalize,
                                                   const specprefill_select* select,
                                                   const specprefill_gather_tokens* gather, void* workspace,
                                                   size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* SPECPREFILL_H */
