#include "select/check.h"

#include <algorithm>
#include <cmath>

#include "common/guarded.h"
#include "common/sequences.h"
#include "common/status.h"
#include "finalize/check.h"
#include "gather/check.h"

namespace specprefill {
namespace {

long long ll(int64_t x) { return static_cast<long long>(x); }

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

int64_t ratio_chunks(double ratio, int64_t chunks, int32_t rounding) {
  const __int128 product = static_cast<__int128>(std::nearbyint(ratio * kRatioUnits)) * chunks;
  const __int128 slack = static_cast<__int128>(kRatioSlack) * chunks;
  if (rounding == SPECPREFILL_CEIL) return static_cast<int64_t>((product - slack + kRatioUnits - 1) / kRatioUnits);
  return static_cast<int64_t>((product + slack) / kRatioUnits);
}

}  // namespace

int64_t budget_chunks(const specprefill_select& args, int64_t chunks) {
  int64_t wanted = chunks;
  if (args.budget == SPECPREFILL_KEEP_RATIO) {
    wanted = ratio_chunks(args.keep, chunks, args.rounding);
  } else if (args.budget == SPECPREFILL_KEEP_TOKENS) {
    const int64_t tokens = static_cast<int64_t>(std::min(args.keep, 0x1p53));
    wanted = args.rounding == SPECPREFILL_CEIL ? ceil_div(tokens, args.chunk_size) : tokens / args.chunk_size;
  }
  return std::min(std::max<int64_t>(wanted, 1), chunks);
}

// What the width of a selection follows from.
int check_budget(const specprefill_select& args) {
  SPECPREFILL_REQUIRE(args.batch >= 1 && args.max_len >= 1 && args.batch <= kMaxSize && args.max_len <= kMaxSize,
                      "importance: expected dimensions [B, T] from 1 to 2^31 - 1, got [%lld, %lld]", ll(args.batch),
                      ll(args.max_len));
  SPECPREFILL_REQUIRE(args.chunk_size >= 1, "chunk_size: expected at least 1, got %lld", ll(args.chunk_size));
  SPECPREFILL_REQUIRE(args.sink >= 0 && args.tail >= 0, "sink and tail: expected at least 0, got %lld and %lld",
                      ll(args.sink), ll(args.tail));
  SPECPREFILL_TRY(check_enum("budget", args.budget, SPECPREFILL_KEEP_MASS));
  SPECPREFILL_TRY(check_enum("rounding", args.rounding, SPECPREFILL_FLOOR));
  if (args.budget == SPECPREFILL_KEEP_TOKENS) {
    SPECPREFILL_REQUIRE(args.keep >= 1, "keep_tokens: expected at least 1, got %g", args.keep);
  } else {
    const char* name = args.budget == SPECPREFILL_KEEP_RATIO ? "keep_ratio" : "keep_mass";
    SPECPREFILL_REQUIRE(args.keep > 0 && args.keep <= 1, "%s: expected a fraction in (0, 1], got %g", name, args.keep);
  }
  return SPECPREFILL_OK;
}

int64_t selection_width(const specprefill_select& args) {
  if (args.protect || args.budget == SPECPREFILL_KEEP_MASS) return args.max_len;
  const int64_t size = std::min(args.chunk_size, args.max_len), chunks = ceil_div(args.max_len, size);
  const int64_t sink = std::min(args.sink, args.max_len), tail = std::min(args.tail, args.max_len);
  // A tail may straddle one chunk more than it fills.
  const int64_t forced = ceil_div(sink, size) + (tail ? 1 + ceil_div(tail, size) : 0);
  return std::min(args.max_len, std::min(chunks, std::max(budget_chunks(args, chunks), forced)) * size);
}

int check_select(const specprefill_select& args) {
  SPECPREFILL_TRY(check_budget(args));
  SPECPREFILL_REQUIRE(args.importance && args.indices && args.num_kept && args.overflow,
                      "importance, indices, num_kept and overflow: expected memory, got a null pointer");
  const int64_t width = selection_width(args);
  SPECPREFILL_REQUIRE(args.width >= width, "indices: expected room for %lld tokens, got %lld", ll(width),
                      ll(args.width));
  return SPECPREFILL_OK;
}

// Each struct by itself, and what two of them say twice.
int check_select_tokens(const specprefill_finalize& finalize, const specprefill_select& select,
                        const specprefill_gather_tokens* gather) {
  SPECPREFILL_TRY(check_finalize(finalize));
  SPECPREFILL_TRY(check_select(select));
  if (gather) SPECPREFILL_TRY(check_gather_tokens(*gather));
  SPECPREFILL_REQUIRE(select.batch == finalize.batch && select.max_len == finalize.max_len,
                      "select: expected the state's [B, T] = [%lld, %lld], got [%lld, %lld]", ll(finalize.batch),
                      ll(finalize.max_len), ll(select.batch), ll(select.max_len));
  SPECPREFILL_REQUIRE(select.importance == finalize.importance && select.seq_lens == finalize.seq_lens,
                      "select: expected finalize's importance and seq_lens, got others");
  SPECPREFILL_REQUIRE(!gather || (gather->batch == select.batch && gather->width == select.width),
                      "gather: expected select's indices [%lld, %lld], got [%lld, %lld]", ll(select.batch),
                      ll(select.width), ll(gather->batch), ll(gather->width));
  SPECPREFILL_REQUIRE(!gather || (gather->indices == select.indices && gather->num_kept == select.num_kept),
                      "gather: expected select's indices and num_kept, got others");
  return SPECPREFILL_OK;
}

}  // namespace specprefill

using namespace specprefill;

int64_t specprefill_select_width(const specprefill_select* args) {
  int64_t width = -1;
  guarded("select_width", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_select, got a null pointer");
    SPECPREFILL_TRY(check_budget(*args));
    width = selection_width(*args);
    return SPECPREFILL_OK;
  });
  return width;
}
