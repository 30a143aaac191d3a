#include "finalize/tile.h"

#include <algorithm>
#include <cmath>

#include "common/processor.h"
#include "common/sequences.h"
#include "common/status.h"
#include "finalize/cpu_kernels.h"

namespace specprefill {
namespace {

constexpr int64_t kSlack = 16;  // floats that a vector may pass an end by

long long ll(int64_t x) { return static_cast<long long>(x); }

// Windows of 2 * length - 1 tokens and more hold the whole prompt wherever they are centred.
int64_t window_width(int64_t width, int64_t length) { return std::min(width, 2 * length - 1); }

}  // namespace

const FinalizeKernels& finalize_kernels() { return SPECPREFILL_PICK(finalize_kernels); }

Finalizer::Finalizer(const specprefill_finalize& args, int num_threads)
    : args_(args), width_(window_width(args.pool_kernel_size, args.max_len)), scratch_size_(0) {
  const int64_t tile = std::min(kFinalizeTile, args.max_len);
  // A row as it lies in the state, widened by its neighbours; the sum of rows so far, and the next one. Also where
  // there is one token to pool: its sum is divided all the same.
  if (args.pool_kernel_size > 1 || args.state_stride_token != 1)
    scratch_size_ = (tile + width_ - 1 + kSlack) + 2 * (tile + kSlack);
  scratch_.resize(static_cast<size_t>(scratch_size_ * num_threads));
}

int Finalizer::check() const {
  SPECPREFILL_TRY(check_lengths("seq_lens", args_.seq_lens, args_.batch, args_.max_len));
  return check_lengths("num_look_ahead", args_.num_look_ahead, args_.batch, args_.look_ahead);
}

bool Finalizer::tile(int64_t b, int64_t start, int64_t stop, int worker) {
  const int64_t length = length_of(args_.seq_lens, b, args_.max_len), inside = std::min(stop, length);
  float* out = args_.importance + b * args_.max_len;
  const bool finite =
      start >= inside || rows(b, start, inside - start, length, scratch_.data() + worker * scratch_size_, out + start);
  std::fill(out + std::max(start, inside), out + stop, 0.0f);
  return finite;
}

bool Finalizer::rows(int64_t b, int64_t start, int64_t count, int64_t length, float* scratch, float* out) const {
  const int64_t rows = length_of(args_.num_look_ahead, b, args_.look_ahead);
  const float* state = args_.state + b * args_.state_stride_batch;
  const bool maximum = args_.reduce == SPECPREFILL_MAX;
  const float divisor = maximum ? 1.0f : static_cast<float>(rows);
  if (scratch_size_ == 0) {
    return finalize_kernels().reduce(state + start, args_.state_stride_row, rows, count, maximum, divisor, out);
  }
  // By this prompt's length, not the batch's: the order of additions must be the one it has alone.
  const int64_t width = window_width(args_.pool_kernel_size, length);
  const int64_t tile = std::min(kFinalizeTile, args_.max_len) + kSlack;
  float *window = scratch, *total = scratch + width_ - 1 + tile, *next = total + tile;
  bool finite = read_row(state, start, count, length, width, window, total);
  for (int64_t n = 1; n < rows; ++n) {
    finite &= read_row(state + n * args_.state_stride_row, start, count, length, width, window, next);
    finalize_kernels().reduce(total, tile, 2, count, maximum, 1.0f, total);
  }
  finalize_kernels().reduce(total, tile, 1, count, maximum, divisor, out);
  return finite;
}

// A row of the state as it is added: tokens side by side, pooled.
bool Finalizer::read_row(const float* state, int64_t start, int64_t count, int64_t length, int64_t width, float* window,
                         float* row) const {
  const int64_t half = width / 2, first = std::max<int64_t>(start - half, 0),
                last = std::min(start + count + half, length), before = first - (start - half);
  std::fill_n(window, before, 0.0f);
  for (int64_t t = first; t < last; ++t) window[before + t - first] = state[t * args_.state_stride_token];
  std::fill(window + before + last - first, window + count + width - 1, 0.0f);
  const bool finite = finalize_kernels().reduce(window, 0, 1, count + width - 1, true, 1.0f, window);
  finalize_kernels().window_sums(window, count, width, row);
  if (args_.pool_edge != SPECPREFILL_POOL_VALID) {
    finalize_kernels().reduce(row, 0, 1, count, true, static_cast<float>(args_.pool_kernel_size), row);
    return finite;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = start + i;
    row[i] /= static_cast<float>(std::min(t + half, length - 1) - std::max<int64_t>(t - half, 0) + 1);
  }
  return finite;
}

int Finalizer::report() const {
  for (int64_t b = 0; b < args_.batch; ++b) {
    for (int64_t n = 0; n < length_of(args_.num_look_ahead, b, args_.look_ahead); ++n) {
      for (int64_t t = 0; t < length_of(args_.seq_lens, b, args_.max_len); ++t) {
        const float x =
            args_.state[b * args_.state_stride_batch + n * args_.state_stride_row + t * args_.state_stride_token];
        if (!std::isfinite(x)) {
          return fail(SPECPREFILL_NOT_FINITE, "state[%lld, %lld, %lld]: expected a finite value, got %g", ll(b), ll(n),
                      ll(t), static_cast<double>(x));
        }
      }
    }
  }
  return SPECPREFILL_OK;
}

}  // namespace specprefill
