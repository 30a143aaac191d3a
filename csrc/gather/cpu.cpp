// Gathering: pure copies, in the longest contiguous runs that the strides allow. Bytes: each kept element once in, once
// out.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "common/sequences.h"
#include "common/status.h"

namespace specprefill {
namespace {

constexpr int64_t kTokensPerTask = 256;

long long ll(int64_t x) { return static_cast<long long>(x); }

// Copies the elements of dimensions [dim, num) of x, in order, to `out`; returns what follows them. The dimensions from
// `flat` on are contiguous: `run_bytes` in one piece.
char* copy_dims(const char* x, const int64_t* sizes, const int64_t* strides_bytes, int dim, int flat, int64_t run_bytes,
                char* out) {
  if (dim == flat) {
    std::memcpy(out, x, static_cast<size_t>(run_bytes));
    return out + run_bytes;
  }
  for (int64_t i = 0; i < sizes[dim]; ++i) {
    out = copy_dims(x + i * strides_bytes[dim], sizes, strides_bytes, dim + 1, flat, run_bytes, out);
  }
  return out;
}

// The elements that belong to one token: some dimensions, the last of them contiguous.
struct TokenShape {
  int64_t sizes[SPECPREFILL_MAX_DIMS], strides_bytes[SPECPREFILL_MAX_DIMS];
  int flat;  // dimensions before the contiguous run
  int64_t run_bytes;

  TokenShape(const int64_t* dims, const int64_t* strides, int num, int64_t item_bytes)
      : flat(num), run_bytes(item_bytes) {
    for (int i = 0; i < num; ++i) sizes[i] = dims[i], strides_bytes[i] = strides[i] * item_bytes;
    while (flat > 0 && (sizes[flat - 1] == 1 || strides_bytes[flat - 1] == run_bytes)) run_bytes *= sizes[--flat];
  }

  char* copy(const char* x, char* out) const { return copy_dims(x, sizes, strides_bytes, 0, flat, run_bytes, out); }
};

int64_t product(const int64_t* sizes, int num) {
  int64_t total = 1;
  for (int i = 0; i < num; ++i) total *= sizes[i];
  return total;
}

// ---- gather_tokens ----

int check(const specprefill_gather_tokens& args) {
  SPECPREFILL_REQUIRE(args.indices && args.num_kept && args.position_ids && args.offsets,
                      "selection: expected memory, got a null pointer");
  SPECPREFILL_REQUIRE(args.batch >= 1 && args.width >= 1 && args.item_bytes >= 1,
                      "selection.indices: expected no empty dimension [B, K], got [%lld, %lld]", ll(args.batch),
                      ll(args.width));
  SPECPREFILL_REQUIRE(args.num_outer >= 0 && args.num_outer <= SPECPREFILL_MAX_DIMS && args.num_inner >= 0 &&
                          args.num_inner <= SPECPREFILL_MAX_DIMS,
                      "x: expected at most %d dimensions on each side of the tokens, got %d and %d",
                      SPECPREFILL_MAX_DIMS, args.num_outer, args.num_inner);
  if (args.cu_seqlens) SPECPREFILL_TRY(check_cu_seqlens(args.cu_seqlens, args.batch, args.tokens));
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t room = args.cu_seqlens ? args.cu_seqlens[b + 1] - args.cu_seqlens[b] : args.tokens;
    SPECPREFILL_TRY(check_selection(args.indices, args.indices_stride, args.width, args.num_kept, b, room));
  }
  return SPECPREFILL_OK;
}

void gather_tokens(const specprefill_gather_tokens& args, int num_threads) {
  const TokenShape token(args.inner_sizes, args.inner_strides, args.num_inner, args.item_bytes);
  const int64_t token_bytes = product(args.inner_sizes, args.num_inner) * args.item_bytes;
  const int64_t outer = product(args.outer_sizes, args.num_outer), capacity = args.batch * args.width;
  args.offsets[0] = 0;
  for (int64_t b = 0; b < args.batch; ++b) args.offsets[b + 1] = args.offsets[b] + args.num_kept[b];
  const int64_t total = args.offsets[args.batch];
  for (int64_t b = 0; b < args.batch; ++b) {
    const int32_t* kept = args.indices + b * args.indices_stride;
    std::copy_n(kept, args.num_kept[b], args.position_ids + args.offsets[b]);
  }
  std::fill(args.position_ids + total, args.position_ids + capacity, int64_t{0});
  if (token_bytes == 0) return;
  const int64_t pieces = (args.width + kTokensPerTask - 1) / kTokensPerTask;
  parallel_for(outer * args.batch * pieces, num_threads, [&](int64_t task, int) {
    const int64_t o = task / (args.batch * pieces), b = task / pieces % args.batch;
    const int64_t first = task % pieces * kTokensPerTask;
    const int64_t last = std::min<int64_t>(first + kTokensPerTask, args.num_kept[b]);
    const char* x = static_cast<const char*>(args.x);
    for (int64_t dim = args.num_outer - 1, rest = o; dim >= 0; rest /= args.outer_sizes[dim], --dim) {
      x += rest % args.outer_sizes[dim] * args.outer_strides[dim] * args.item_bytes;
    }
    x += (args.cu_seqlens ? args.cu_seqlens[b] * args.stride_token : b * args.stride_batch) * args.item_bytes;
    const int32_t* kept = args.indices + b * args.indices_stride;
    char* out = static_cast<char*>(args.values) + (o * capacity + args.offsets[b] + first) * token_bytes;
    for (int64_t i = first; i < last; ++i) out = token.copy(x + kept[i] * args.stride_token * args.item_bytes, out);
  });
  for (int64_t o = 0; o < outer; ++o) {
    char* out = static_cast<char*>(args.values) + o * capacity * token_bytes;
    std::memset(out + total * token_bytes, 0, static_cast<size_t>((capacity - total) * token_bytes));
  }
}

// ---- gather_kv ----

int64_t source_room(const specprefill_gather_kv& args, int64_t b) {
  if (args.layout == SPECPREFILL_PACKED) return args.cu_seqlens[b + 1] - args.cu_seqlens[b];
  if (args.layout == SPECPREFILL_PAGED) return args.block_table_width * args.source.tokens;
  return args.source.tokens;
}

// No two sequences may write the same block.
int check_distinct_blocks(const specprefill_gather_kv& args) {
  std::vector<char> written(static_cast<size_t>(args.target.rows), 0);
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t i = 0; i * args.target.tokens < args.num_kept[b]; ++i) {
      const int32_t block = args.target_block_table[b * args.target_block_table_stride + i];
      SPECPREFILL_REQUIRE(!written[static_cast<size_t>(block)],
                          "out_block_table[%lld, %lld]: expected a block that no other entry names, got %d", ll(b),
                          ll(i), block);
      written[static_cast<size_t>(block)] = 1;
    }
  }
  return SPECPREFILL_OK;
}

int check(const specprefill_gather_kv& args) {
  const specprefill_cache &source = args.source, &target = args.target;
  SPECPREFILL_REQUIRE(source.data && target.data && args.indices && args.num_kept,
                      "cache and selection: expected memory, got a null pointer");
  SPECPREFILL_REQUIRE(args.layout >= SPECPREFILL_DENSE && args.layout <= SPECPREFILL_PAGED,
                      "layout: expected a specprefill_layout, got %d", args.layout);
  SPECPREFILL_REQUIRE(args.batch >= 1 && args.width >= 1,
                      "selection.indices: expected no empty dimension, got [%lld, %lld]", ll(args.batch),
                      ll(args.width));
  SPECPREFILL_REQUIRE(source.tokens >= 1 && source.heads >= 1 && source.head_dim >= 1 && target.tokens >= 1 &&
                          source.heads == target.heads && source.head_dim == target.head_dim &&
                          source.item_bytes == target.item_bytes && source.item_bytes >= 1,
                      "out: expected the cache's heads, head size and item size");
  const bool paged = args.layout == SPECPREFILL_PAGED, packed = args.layout == SPECPREFILL_PACKED;
  const int64_t rows_needed = args.layout == SPECPREFILL_DENSE ? args.batch : 1;
  SPECPREFILL_REQUIRE(source.rows >= rows_needed && target.rows >= rows_needed,
                      "cache: expected %lld sequences, got %lld", ll(rows_needed),
                      ll(std::min(source.rows, target.rows)));
  if (packed) SPECPREFILL_TRY(check_cu_seqlens(args.cu_seqlens, args.batch, source.tokens));
  SPECPREFILL_REQUIRE(!paged || (args.block_table && args.target_block_table),
                      "block_table: expected with paged caches, got none");
  int64_t total = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t room = source_room(args, b);
    SPECPREFILL_TRY(check_selection(args.indices, args.indices_stride, args.width, args.num_kept, b, room));
    const int64_t kept = args.num_kept[b];
    total += kept;
    const int64_t target_room = paged    ? args.target_block_table_width * target.tokens
                                : packed ? target.tokens - (total - kept)
                                         : target.tokens;
    SPECPREFILL_REQUIRE(kept <= target_room, "out: expected room for %lld tokens of sequence %lld, got %lld", ll(kept),
                        ll(b), ll(target_room));
    if (paged) {
      // Only the blocks of kept tokens are read.
      for (int64_t i = 0; i < kept; ++i) {
        const int64_t block = args.indices[b * args.indices_stride + i] / source.tokens;
        const int32_t id = args.block_table[b * args.block_table_stride + block];
        SPECPREFILL_REQUIRE(id >= 0 && id < source.rows,
                            "block_table[%lld, %lld]: expected a block id in [0, %lld), got %d", ll(b), ll(block),
                            ll(source.rows), id);
      }
      SPECPREFILL_TRY(check_blocks("out_block_table", args.target_block_table, args.target_block_table_stride, b, kept,
                                   target.tokens, target.rows));
    }
  }
  return paged ? check_distinct_blocks(args) : SPECPREFILL_OK;
}

// Address of one token, all heads; `start` is the sequence's first token in a packed buffer.
char* token_at(const specprefill_cache& cache, const int32_t* blocks, int64_t b, int64_t start, int64_t t, bool dense) {
  char* base = static_cast<char*>(const_cast<void*>(cache.data));
  const int64_t row = blocks ? blocks[t / cache.tokens] : dense ? b : 0;
  const int64_t token = blocks ? t % cache.tokens : start + t;
  return base + (row * cache.stride_row + token * cache.stride_token) * cache.item_bytes;
}

void copy_heads(const specprefill_cache& source, const char* from, const specprefill_cache& target, char* to) {
  const int64_t bytes = source.item_bytes;
  const bool contiguous = source.stride_dim == 1 && target.stride_dim == 1;
  for (int64_t h = 0; h < source.heads; ++h) {
    const char* x = from + h * source.stride_head * bytes;
    char* out = to + h * target.stride_head * bytes;
    if (contiguous) {
      std::memcpy(out, x, static_cast<size_t>(source.head_dim * bytes));
      continue;
    }
    for (int64_t d = 0; d < source.head_dim; ++d) {
      std::memcpy(out + d * target.stride_dim * bytes, x + d * source.stride_dim * bytes, static_cast<size_t>(bytes));
    }
  }
}

void gather_kv(const specprefill_gather_kv& args, int num_threads) {
  const bool dense = args.layout == SPECPREFILL_DENSE, packed = args.layout == SPECPREFILL_PACKED;
  std::vector<int64_t> target_start(static_cast<size_t>(args.batch), 0);
  for (int64_t b = 1; packed && b < args.batch; ++b) {
    target_start[static_cast<size_t>(b)] = target_start[static_cast<size_t>(b - 1)] + args.num_kept[b - 1];
  }
  const int64_t pieces = (args.width + kTokensPerTask - 1) / kTokensPerTask;
  parallel_for(args.batch * pieces, num_threads, [&](int64_t task, int) {
    const int64_t b = task / pieces, first = task % pieces * kTokensPerTask;
    const int64_t last = std::min<int64_t>(first + kTokensPerTask, args.num_kept[b]);
    const int32_t* from_blocks = args.block_table ? args.block_table + b * args.block_table_stride : nullptr;
    const int32_t* to_blocks =
        args.target_block_table ? args.target_block_table + b * args.target_block_table_stride : nullptr;
    const int64_t start = packed ? args.cu_seqlens[b] : 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = args.indices[b * args.indices_stride + i];
      copy_heads(args.source, token_at(args.source, from_blocks, b, start, t, dense), args.target,
                 token_at(args.target, to_blocks, b, target_start[static_cast<size_t>(b)], i, dense));
    }
  });
}

}  // namespace
}  // namespace specprefill

using namespace specprefill;

int specprefill_gather_tokens_cpu(const specprefill_gather_tokens* args, int num_threads) {
  SPECPREFILL_REQUIRE(args, "args: expected a specprefill_gather_tokens, got a null pointer");
  SPECPREFILL_TRY(check(*args));
  gather_tokens(*args, num_threads);
  return SPECPREFILL_OK;
}

int specprefill_gather_kv_cpu(const specprefill_gather_kv* args, int num_threads) {
  SPECPREFILL_REQUIRE(args, "args: expected a specprefill_gather_kv, got a null pointer");
  try {
    SPECPREFILL_TRY(check(*args));
    gather_kv(*args, num_threads);
    return SPECPREFILL_OK;
  } catch (const std::bad_alloc&) {
    return fail(SPECPREFILL_OUT_OF_MEMORY, "gather_kv: out of memory");
  }
}
