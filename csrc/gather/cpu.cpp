// Gathering: pure copies, in the longest contiguous runs that the strides allow. Bytes: each kept element once in, once
// out.
#include <algorithm>
#include <cstring>
#include <vector>

#include "common/guarded.h"
#include "common/parallel.h"
#include "common/sequences.h"
#include "common/status.h"
#include "gather/check.h"
#include "gather/tokens.h"

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

// Kept positions i, i + 1, ... that follow each other in the prompt too; at least 1, up to `last`. Selections come in
// chunks, so this is how most tokens are copied.
int64_t run_length(const int32_t* kept, int64_t i, int64_t last) {
  int64_t end = i + 1;
  while (end < last && kept[end] == kept[end - 1] + 1) ++end;
  return end - i;
}

// ---- gather_tokens ----

int check_contents(const specprefill_gather_tokens& args) {
  if (args.cu_seqlens) SPECPREFILL_TRY(check_cu_seqlens(args.cu_seqlens, args.batch, args.tokens));
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t room = args.cu_seqlens ? args.cu_seqlens[b + 1] - args.cu_seqlens[b] : args.tokens;
    SPECPREFILL_TRY(check_selection(args.indices, args.indices_stride, args.width, args.num_kept, b, room));
  }
  return SPECPREFILL_OK;
}

}  // namespace

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
  parallel_for(
      outer * args.batch * pieces, threads_for(outer * total * token_bytes, num_threads), [&](int64_t task, int) {
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
        const int64_t stride_bytes = args.stride_token * args.item_bytes;
        const bool adjacent = token.flat == 0 && stride_bytes == token.run_bytes;
        for (int64_t i = first, run; i < last; i += run) {
          run = adjacent ? run_length(kept, i, last) : 1;
          const char* from = x + kept[i] * stride_bytes;
          if (adjacent) std::memcpy(out, from, static_cast<size_t>(run * token.run_bytes));
          out = adjacent ? out + run * token.run_bytes : token.copy(from, out);
        }
      });
  for (int64_t o = 0; o < outer; ++o) {
    char* out = static_cast<char*>(args.values) + o * capacity * token_bytes;
    std::memset(out + total * token_bytes, 0, static_cast<size_t>((capacity - total) * token_bytes));
  }
}

namespace {

// ---- gather_kv ----

// Tokens that a row of a block table reaches; positions stay below kMaxSize, so a larger room need not be known.
int64_t table_room(int64_t width, int64_t block_size) {
  if (width < 1) return 0;
  return width > kMaxSize / block_size ? kMaxSize : width * block_size;
}

int64_t source_room(const specprefill_gather_kv& args, int64_t b) {
  if (args.layout == SPECPREFILL_PACKED) return args.cu_seqlens[b + 1] - args.cu_seqlens[b];
  if (args.layout == SPECPREFILL_PAGED) return table_room(args.block_table_width, args.source.tokens);
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

int check_contents(const specprefill_gather_kv& args) {
  const specprefill_cache &source = args.source, &target = args.target;
  const bool paged = args.layout == SPECPREFILL_PAGED, packed = args.layout == SPECPREFILL_PACKED;
  if (packed) SPECPREFILL_TRY(check_cu_seqlens(args.cu_seqlens, args.batch, source.tokens));
  int64_t total = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t room = source_room(args, b);
    SPECPREFILL_TRY(check_selection(args.indices, args.indices_stride, args.width, args.num_kept, b, room));
    const int64_t kept = args.num_kept[b];
    total += kept;
    const int64_t target_room = paged    ? table_room(args.target_block_table_width, target.tokens)
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

// Where one sequence's tokens lie in a cache.
struct Place {
  const specprefill_cache& cache;
  const int32_t* blocks;  // nullptr: not paged
  int64_t row, start;     // of the sequence, when it is not paged

  char* at(int64_t t) const {
    char* base = static_cast<char*>(const_cast<void*>(cache.data));
    const int64_t r = blocks ? blocks[t / cache.tokens] : row, token = blocks ? t % cache.tokens : start + t;
    return base + (r * cache.stride_row + token * cache.stride_token) * cache.item_bytes;
  }

  // Tokens from t on that are sure to lie one stride apart.
  int64_t straight(int64_t t) const { return blocks ? cache.tokens - t % cache.tokens : kMaxSize; }
};

// Copies `count` tokens, all heads, in the longest pieces that are contiguous on both sides.
void copy_tokens(const specprefill_cache& source, const char* from, const specprefill_cache& target, char* to,
                 int64_t count) {
  const int64_t item = source.item_bytes, dim = source.head_dim;
  if (source.stride_dim != 1 || target.stride_dim != 1) {
    for (int64_t i = 0; i < count * source.heads * dim; ++i) {
      const int64_t d = i % dim, h = i / dim % source.heads, t = i / dim / source.heads;
      std::memcpy(to + (t * target.stride_token + h * target.stride_head + d * target.stride_dim) * item,
                  from + (t * source.stride_token + h * source.stride_head + d * source.stride_dim) * item,
                  static_cast<size_t>(item));
    }
    return;
  }
  int64_t heads = source.heads, tokens = count, run = dim;
  if (source.stride_head == dim && target.stride_head == dim) run *= heads, heads = 1;
  if (source.stride_token == run && target.stride_token == run) run *= tokens, tokens = 1;
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(to + (t * target.stride_token + h * target.stride_head) * item,
                  from + (t * source.stride_token + h * source.stride_head) * item, static_cast<size_t>(run * item));
    }
  }
}

void gather_kv(const specprefill_gather_kv& args, int num_threads) {
  const bool paged = args.layout == SPECPREFILL_PAGED, packed = args.layout == SPECPREFILL_PACKED;
  std::vector<int64_t> target_start(static_cast<size_t>(args.batch), 0);
  for (int64_t b = 1; packed && b < args.batch; ++b) {
    target_start[static_cast<size_t>(b)] = target_start[static_cast<size_t>(b - 1)] + args.num_kept[b - 1];
  }
  const int64_t pieces = (args.width + kTokensPerTask - 1) / kTokensPerTask;
  parallel_for(args.batch * pieces, num_threads, [&](int64_t task, int) {
    const int64_t b = task / pieces, first = task % pieces * kTokensPerTask;
    const int64_t last = std::min<int64_t>(first + kTokensPerTask, args.num_kept[b]), row = packed ? 0 : b;
    const Place source{args.source, paged ? args.block_table + b * args.block_table_stride : nullptr, row,
                       packed ? args.cu_seqlens[b] : 0};
    const Place target{args.target, paged ? args.target_block_table + b * args.target_block_table_stride : nullptr, row,
                       target_start[static_cast<size_t>(b)]};
    const int32_t* kept = args.indices + b * args.indices_stride;
    for (int64_t i = first, run; i < last; i += run) {
      run = std::min({run_length(kept, i, last), source.straight(kept[i]), target.straight(i)});
      copy_tokens(args.source, source.at(kept[i]), args.target, target.at(i), run);
    }
  });
}

}  // namespace
}  // namespace specprefill

using namespace specprefill;

int specprefill_gather_tokens_cpu(const specprefill_gather_tokens* args, int num_threads) {
  return guarded("gather_tokens", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_gather_tokens, got a null pointer");
    SPECPREFILL_TRY(check_gather_tokens(*args));
    SPECPREFILL_TRY(check_contents(*args));
    gather_tokens(*args, clamp_threads(num_threads));
    return SPECPREFILL_OK;
  });
}

int specprefill_gather_kv_cpu(const specprefill_gather_kv* args, int num_threads) {
  return guarded("gather_kv", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_gather_kv, got a null pointer");
    SPECPREFILL_TRY(check_gather_kv(*args));
    SPECPREFILL_TRY(check_contents(*args));
    gather_kv(*args, clamp_threads(num_threads));
    return SPECPREFILL_OK;
  });
}
