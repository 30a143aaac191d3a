#include "finalize/check.h"

#include "common/guarded.h"
#include "common/sequences.h"
#include "common/status.h"

namespace specprefill {
namespace {
long long ll(int64_t x) { return static_cast<long long>(x); }
}  // namespace

int check_finalize(const specprefill_finalize& args) {
  SPECPREFILL_REQUIRE(args.state && args.importance, "state: expected memory, got a null pointer");
  SPECPREFILL_REQUIRE(args.batch >= 1 && args.look_ahead >= 1 && args.max_len >= 1,
                      "state: expected no empty dimension [B, N, T], got [%lld, %lld, %lld]", ll(args.batch),
                      ll(args.look_ahead), ll(args.max_len));
  SPECPREFILL_REQUIRE(args.batch <= kMaxSize && args.look_ahead <= kMaxSize && args.max_len <= kMaxSize,
                      "state: expected dimensions below 2^31, got [%lld, %lld, %lld]", ll(args.batch),
                      ll(args.look_ahead), ll(args.max_len));
  SPECPREFILL_TRY(check_enum("reduce", args.reduce, SPECPREFILL_MAX));
  SPECPREFILL_TRY(check_enum("pool_edge", args.pool_edge, SPECPREFILL_POOL_VALID));
  SPECPREFILL_REQUIRE(args.pool_kernel_size >= 1 && args.pool_kernel_size % 2 == 1,
                      "pool_kernel_size: expected an odd number (a centred window), got %lld",
                      ll(args.pool_kernel_size));
  return SPECPREFILL_OK;
}

}  // namespace specprefill
