// Importance from the state. Bytes: N * T fp32 in, T out; one pass, rows summed in their order.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/guarded.h"
#include "common/parallel.h"
#include "common/sequences.h"
#include "common/status.h"
#include "finalize/check.h"

namespace specprefill {
namespace {

constexpr int64_t kTile = 4096;

long long ll(int64_t x) { return static_cast<long long>(x); }

int check_contents(const specprefill_finalize& args) {
  SPECPREFILL_TRY(check_lengths("seq_lens", args.seq_lens, args.batch, args.max_len));
  return check_lengths("num_look_ahead", args.num_look_ahead, args.batch, args.look_ahead);
}

// Sums of `width` neighbours, centred: out[i] for tokens [start, start + count) of a row of `length` tokens.
void pool(const float* row, int64_t stride, int64_t start, int64_t count, int64_t length, int64_t width,
          bool valid_edge, float* out) {
  const int64_t half = std::min(width / 2, length);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t low = std::max<int64_t>(start + i - half, 0), high = std::min(start + i + half, length - 1);
    float sum = 0;
    for (int64_t t = low; t <= high; ++t) sum += row[t * stride];
    out[i] = sum / static_cast<float>(valid_edge ? high - low + 1 : width);
  }
}

// Neither NaN nor Inf: no magnitude has an exponent of ones. Integers, so that compilers vectorise the maximum.
bool all_finite(const float* x, int64_t stride, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i * stride, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest < 0x7f800000u;
}

// One tile of one sequence's importance. False when the state is not finite there.
bool finalize_tile(const specprefill_finalize& args, int64_t b, int64_t start, int64_t count, int64_t length,
                   float* row, float* out) {
  const int64_t rows = length_of(args.num_look_ahead, b, args.look_ahead), stride = args.state_stride_token;
  bool finite = true;
  for (int64_t n = 0; n < rows; ++n) {
    const float* state = args.state + b * args.state_stride_batch + n * args.state_stride_row;
    const float* x = state + start * stride;
    finite &= all_finite(x, stride, count);
    const float* from = x;
    if (args.pool_kernel_size > 1) {
      pool(state, stride, start, count, length, args.pool_kernel_size, args.pool_edge == SPECPREFILL_POOL_VALID, row);
      from = row;
    } else if (stride != 1) {
      for (int64_t i = 0; i < count; ++i) row[i] = x[i * stride];
      from = row;
    }
    if (n == 0) {
      std::copy_n(from, count, out);
    } else if (args.reduce == SPECPREFILL_MAX) {
      for (int64_t i = 0; i < count; ++i) out[i] = std::max(out[i], from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] += from[i];
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
  return guarded("finalize_importance", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_finalize, got a null pointer");
    SPECPREFILL_TRY(check_finalize(*args));
    SPECPREFILL_TRY(check_contents(*args));
    num_threads = clamp_threads(num_threads);
    std::vector<float> rows(static_cast<size_t>(num_threads) * kTile);
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
    return finite ? static_cast<int>(SPECPREFILL_OK) : report_not_finite(*args);
  });
}
