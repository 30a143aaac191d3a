#include "gather/check.h"

#include <algorithm>

#include "common/guarded.h"
#include "common/sequences.h"
#include "common/status.h"

namespace specprefill {
namespace {

long long ll(int64_t x) { return static_cast<long long>(x); }

int check_sizes(int64_t batch, int64_t width, int64_t item_bytes) {
  SPECPREFILL_REQUIRE(batch >= 1 && width >= 1 && batch <= kMaxSize && width <= kMaxSize / batch,
                      "selection.indices: expected dimensions [B, K] from 1 on, B * K below 2^31, got [%lld, %lld]",
                      ll(batch), ll(width));
  SPECPREFILL_REQUIRE(item_bytes >= 1 && item_bytes <= kMaxSize, "item_bytes: expected at least 1, got %lld",
                      ll(item_bytes));
  return SPECPREFILL_OK;
}

// Multiplies `total` by the sizes.
int check_dims(const int64_t* sizes, int num, int64_t* total) {
  for (int i = 0; i < num; ++i) {
    SPECPREFILL_REQUIRE(sizes[i] >= 0 && !__builtin_mul_overflow(*total, sizes[i], total),
                        "x: expected sizes that memory can hold, got %lld", ll(sizes[i]));
  }
  return SPECPREFILL_OK;
}

}  // namespace

int check_gather_tokens(const specprefill_gather_tokens& args) {
  SPECPREFILL_REQUIRE(args.indices && args.num_kept && args.position_ids && args.offsets,
                      "selection: expected memory, got a null pointer");
  SPECPREFILL_TRY(check_sizes(args.batch, args.width, args.item_bytes));
  SPECPREFILL_REQUIRE(args.num_outer >= 0 && args.num_outer <= SPECPREFILL_MAX_DIMS && args.num_inner >= 0 &&
                          args.num_inner <= SPECPREFILL_MAX_DIMS,
                      "x: expected at most %d dimensions on each side of the tokens, got %d and %d",
                      SPECPREFILL_MAX_DIMS, args.num_outer, args.num_inner);
  int64_t outer = 1, inner = args.item_bytes, all;
  SPECPREFILL_TRY(check_dims(args.outer_sizes, args.num_outer, &outer));
  SPECPREFILL_TRY(check_dims(args.inner_sizes, args.num_inner, &inner));
  SPECPREFILL_REQUIRE(
      !__builtin_mul_overflow(outer, inner, &all) && !__builtin_mul_overflow(all, args.batch * args.width, &all),
      "x: expected a result that memory can hold, got %lld elements per token of %lld bytes", ll(outer), ll(inner));
  SPECPREFILL_REQUIRE(all == 0 || (args.x && args.values), "x and values: expected memory, got a null pointer");
  return SPECPREFILL_OK;
}

int check_gather_kv(const specprefill_gather_kv& args) {
  const specprefill_cache &source = args.source, &target = args.target;
  SPECPREFILL_REQUIRE(source.data && target.data && args.indices && args.num_kept,
                      "cache and selection: expected memory, got a null pointer");
  SPECPREFILL_TRY(check_enum("layout", args.layout, SPECPREFILL_PAGED));
  SPECPREFILL_TRY(check_sizes(args.batch, args.width, source.item_bytes));
  SPECPREFILL_REQUIRE(source.tokens >= 1 && source.heads >= 1 && source.head_dim >= 1 && target.tokens >= 1 &&
                          source.heads == target.heads && source.head_dim == target.head_dim &&
                          source.item_bytes == target.item_bytes,
                      "out: expected the cache's heads, head size and item size");
  SPECPREFILL_REQUIRE(source.tokens <= kMaxSize && target.tokens <= kMaxSize && target.rows <= kMaxSize &&
                          source.heads <= kMaxSize && source.head_dim <= kMaxSize / source.item_bytes,
                      "cache: expected dimensions below 2^31, got %lld tokens, %lld heads of %lld", ll(source.tokens),
                      ll(source.heads), ll(source.head_dim));
  const int64_t rows_needed = args.layout == SPECPREFILL_DENSE ? args.batch : 1;
  SPECPREFILL_REQUIRE(source.rows >= rows_needed && target.rows >= rows_needed,
                      "cache: expected %lld sequences, got %lld", ll(rows_needed),
                      ll(std::min(source.rows, target.rows)));
  SPECPREFILL_REQUIRE(args.layout != SPECPREFILL_PACKED || args.cu_seqlens,
                      "cu_seqlens: expected a tensor with the packed layout, got none");
  SPECPREFILL_REQUIRE(args.layout != SPECPREFILL_PAGED || (args.block_table && args.target_block_table),
                      "block_table: expected with paged caches, got none");
  return SPECPREFILL_OK;
}

}  // namespace specprefill
