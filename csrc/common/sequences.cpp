#include "common/sequences.h"

namespace specprefill {
namespace {
long long ll(int64_t x) { return static_cast<long long>(x); }
}  // namespace

int check_enum(const char* name, int32_t value, int32_t last) {
  SPECPREFILL_REQUIRE(value >= 0 && value <= last, "%s: expected a specprefill constant in [0, %d], got %d", name, last,
                      value);
  return SPECPREFILL_OK;
}

int check_lengths(const char* name, const int32_t* lengths, int64_t batch, int64_t capacity) {
  for (int64_t b = 0; lengths && b < batch; ++b) {
    SPECPREFILL_REQUIRE(lengths[b] >= 1 && lengths[b] <= capacity, "%s[%lld]: expected 1 <= length <= %lld, got %d",
                        name, ll(b), ll(capacity), lengths[b]);
  }
  return SPECPREFILL_OK;
}

int check_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t total) {
  SPECPREFILL_REQUIRE(cu_seqlens, "cu_seqlens: expected a tensor with the packed layout, got none");
  SPECPREFILL_REQUIRE(cu_seqlens[0] >= 0, "cu_seqlens[0]: expected at least 0, got %d", cu_seqlens[0]);
  for (int64_t b = 0; b < batch; ++b) {
    SPECPREFILL_REQUIRE(cu_seqlens[b + 1] > cu_seqlens[b],
                        "cu_seqlens[%lld]: expected more than cu_seqlens[%lld] = %d, got %d", ll(b + 1), ll(b),
                        cu_seqlens[b], cu_seqlens[b + 1]);
  }
  SPECPREFILL_REQUIRE(cu_seqlens[batch] <= total, "cu_seqlens[%lld]: expected at most %lld, the packed tokens, got %d",
                      ll(batch), ll(total), cu_seqlens[batch]);
  return SPECPREFILL_OK;
}

int check_blocks(const char* name, const int32_t* table, int64_t stride, int64_t b, int64_t length, int64_t block_size,
                 int64_t num_blocks) {
  for (int64_t i = 0; i * block_size < length; ++i) {
    const int32_t block = table[b * stride + i];
    SPECPREFILL_REQUIRE(block >= 0 && block < num_blocks, "%s[%lld, %lld]: expected a block id in [0, %lld), got %d",
                        name, ll(b), ll(i), ll(num_blocks), block);
  }
  return SPECPREFILL_OK;
}

int check_selection(const int32_t* indices, int64_t stride, int64_t width, const int32_t* num_kept, int64_t b,
                    int64_t room) {
  SPECPREFILL_REQUIRE(num_kept[b] >= 0 && num_kept[b] <= width,
                      "selection.num_kept[%lld]: expected a count in [0, %lld], got %d", ll(b), ll(width), num_kept[b]);
  for (int64_t i = 0; i < num_kept[b]; ++i) {
    const int32_t position = indices[b * stride + i];
    SPECPREFILL_REQUIRE(position >= 0 && position < room,
                        "selection.indices[%lld, %lld]: expected a position in [0, %lld), got %d", ll(b), ll(i),
                        ll(room), position);
  }
  return SPECPREFILL_OK;
}

}  // namespace specprefill
