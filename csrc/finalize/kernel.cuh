// Importance from the state.
//
// Bytes that must move: 4 * rows * length in and 4 * T out for each sequence. With 8 rows of 128K tokens that is 4.5
// MiB, 1.4 us at 3.35 TB/s; a launch and one trip to memory take longer than that, so what counts is that all loads are
// on their way at once: each thread has one of 16 bytes for each of 8 rows, and 512 tokens a block give every processor
// of a large GPU two blocks of such a prompt. A pooling window reads each row w / 4 + 1 times, all but once out of the
// first-level cache.
#pragma once

#include "finalize/importance.cuh"

namespace specprefill {

constexpr int kFinalizeThreads = 128;
constexpr int kFinalizeTokens = 4 * kFinalizeThreads;  // of a block

__global__ void __launch_bounds__(kFinalizeThreads)
    finalize_kernel(const __grid_constant__ ImportanceSource source, float* importance, unsigned tiles) {
  const unsigned b = blockIdx.x / tiles;
  const int64_t first = static_cast<int64_t>(blockIdx.x % tiles) * kFinalizeTokens + 4 * threadIdx.x;
  if (first >= source.max_len) return;
  const int t = static_cast<int>(first);
  const int length = clamped_length(source.seq_lens, b, source.max_len, 0);
  const int rows = clamped_length(source.num_look_ahead, b, source.look_ahead, 1);
  const Four four = importance_of_four(source, b, rows, t, length);
  float* out = importance + static_cast<int64_t>(b) * source.max_len + t;
  if (t <= source.max_len - 4 && source.max_len % 4 == 0 && reinterpret_cast<uintptr_t>(importance) % 16 == 0) {
    *reinterpret_cast<float4*>(out) = make_float4(four.x[0], four.x[1], four.x[2], four.x[3]);
  } else {
    for (int i = 0; i < 4 && t < source.max_len - i; ++i) out[i] = four.x[i];
  }
}

}  // namespace specprefill
