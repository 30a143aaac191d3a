// Importance from the state. Bytes: N * T fp32 in, T out; one pass, rows summed in their order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>
#include <vector>

#include "common/parallel.h"
#include "common/sequences.h"
#include "common/status.h"

namespace specprefill {
namespace {

constexpr int64_t kTile = 4096;

long long ll(int64_t x) { return static_cast<long long>(x); }

int check(const specprefill_finalize& args) {
  SPECPREFILL_REQUIRE(args.state && args.importance, "state: expected memory, got a null pointer");
  SPECPREFILL_REQUIRE(args.batch >= 1 && args.look_ahead >= 1 && args.max_len >= 1,
                      "state: expected no empty dimension [B, N, T], got [%lld, %lld, %lld]", ll(args.batch),
                      ll(args.look_ahead), ll(args.max_len));
  SPECPREFILL_REQUIRE(args.pool_kernel_size >= 1 && args.pool_kernel_size % 2 == 1,
                      "pool_kernel_size: expected an odd number (a centred window), got %lld",
                      ll(args.pool_kernel_size));
  SPECPREFILL_TRY(check_lengths("seq_lens", args.seq_lens, args.batch, args.max_len));
  return check_lengths("num_look_ahead", args.num_look_ahead, args.batch, args.look_ahead);
}

// Sums of `width` neighbours, centred: out[i] for tokens [start, start + count) of a row of `length` tokens.
void pool(const float* row, int64_t stride, int64_t start, int64_t count, int64_t length, int64_t width,
          bool valid_edge, float* out) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t low = std::max<int64_t>(start + i - half, 0), high = std::min(start + i + half, length - 1);
    float sum = 0;
    for (int64_t t = low; t <= high; ++t) sum += row[t * stride];
    out[i] = sum / static_cast<float>(valid_edge ? high - low + 1 : width);
  }
}

// One tile of one sequence's importance. False when the state is not finite there.
bool finalize_tile(const specprefill_finalize& args, int64_t b, int64_t start, int64_t count, int64_t length,
                   float* row, float* out) {
  const int64_t rows = length_of(args.num_look_ahead, b, args.look_ahead), stride = args.state_stride_token;
  bool finite = true;
  for (int64_t n = 0; n < rows; ++n) {
    const float* state = args.state + b * args.state_stride_batch + n * args.state_stride_row;
    const float* x = state + start * stride;
    float zero = 0;  // x * 0 is NaN for NaN and Inf: one test for the whole tile
    for (int64_t i = 0; i < count; ++i) zero += x[i * stride] * 0.0f;
    finite &= zero == 0.0f;
    if (args.pool_kernel_size > 1) {
      pool(state, stride, start, count, length, args.pool_kernel_size, args.pool_edge == SPECPREFILL_POOL_VALID, row);
    } else {
      for (int64_t i = 0; i < count; ++i) row[i] = x[i * stride];
    }
    if (n == 0) {
      std::copy_n(row, count, out);
    } else if (args.reduce == SPECPREFILL_MAX) {
      for (int64_t i = 0; i < count; ++i) out[i] = std::max(out[i], row[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] += row[i];
    }
  }
  if (args.reduce == SPECPREFILL_MEAN) {
    for (int64_t i = 0; i < count; ++i) out[i] /= static_cast<float>(rows);
  }
  return finite;
}

int report_not_finite(const specprefill_finalize& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    for (int64_t n = 0; n < length_of(args.num_look_ahead, b, args.look_ahead); ++n) {
      for (int64_t t = 0; t < length_of(args.seq_lens, b, args.max_len); ++t) {
        const float x =
            args.state[b * args.state_stride_batch + n * args.state_stride_row + t * args.state_stride_token];
        if (!std::isfinite(x)) {
          return fail(SPECPREFILL_NOT_FINITE, "state[%lld, %lld, %lld]: expected a finite value, got %g", ll(b), ll(n),
                      ll(t), static_cast<double>(x));
        }
      }
    }
  }
  return SPECPREFILL_OK;
}

}  // namespace
}  // namespace specprefill

using namespace specprefill;

int specprefill_finalize_cpu(const specprefill_finalize* args, int num_threads) {
  SPECPREFILL_REQUIRE(args, "args: expected a specprefill_finalize, got a null pointer");
  SPECPREFILL_TRY(check(*args));
  try {
    std::vector<float> rows(static_cast<size_t>(std::max(1, num_threads)) * kTile);
    std::atomic<bool> finite{true};
    const int64_t tiles = (args->max_len + kTile - 1) / kTile;
    parallel_for(args->batch * tiles, num_threads, [&](int64_t task, int worker) {
      const int64_t b = task / tiles, start = task % tiles * kTile, stop = std::min(start + kTile, args->max_len);
      const int64_t length = length_of(args->seq_lens, b, args->max_len), inside = std::min(stop, length);
      float* out = args->importance + b * args->max_len;
      if (start < inside &&
          !finalize_tile(*args, b, start, inside - start, length, rows.data() + worker * kTile, out + start)) {
        finite = false;
      }
      std::fill(out + std::max(start, inside), out + stop, 0.0f);
    });
    return finite ? SPECPREFILL_OK : report_not_finite(*args);
  } catch (const std::bad_alloc&) {
    return fail(SPECPREFILL_OUT_OF_MEMORY, "finalize_importance: out of memory");
  }
}
