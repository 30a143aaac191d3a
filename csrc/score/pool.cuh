// Second pass: weights, their sums over a window of positions, and the maximum of these in the state.
//
// The sum over a window is a product with a band of ones, on tensor cores: what a lane holds of the weights after the
// first product is just what it must hold of the left operand of the next. A weight is the sum of two bf16 there, which
// leaves an error of 2^-17 of it.
#pragma once

#include "common/ptx.cuh"
#include "score/params.cuh"
#include "score/rows.cuh"
#include "score/tile.cuh"

namespace specprefill {

// Weights of 16 rows and 16 keys as A fragments: a bf16 and what is left.
struct Weights {
  uint32_t high[4], low[4];

  // From blocks j and j + 1 of eight keys.
  template <int MT>
  __device__ __forceinline__ void take(const Tile<MT>& c, int j, int m) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x = c[j + i / 2][m][i % 2 * 2], y = c[j + i / 2][m][i % 2 * 2 + 1];
      high[i] = pack_bf16(x, y);
      low[i] = pack_bf16(x - __uint_as_float(high[i] << 16), y - __uint_as_float(high[i] & 0xffff0000u));
    }
  }

  __device__ __forceinline__ void add_to(float (&sums)[4], const uint32_t (&band)[2]) const {
    mma_bf16(sums, low, band[0], band[1]);
    mma_bf16(sums, high, band[0], band[1]);
  }
};

// Ones where position `to` + g lies within `half` of key `from` + k, as a B fragment.
__device__ __forceinline__ void make_band(int from, int to, int half, int lane, uint32_t (&band)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = from + lane % 4 * 2 + i * 8, position = to + lane / 4;
    const bool first = abs(position - key) <= half, second = abs(position - key - 1) <= half;
    band[i] = (first ? 0x3f80u : 0u) | (second ? 0x3f800000u : 0u);
  }
}

// Logits into weights; both are log2, `norms` the sums' of [16 rows][row g, row g + 8].
template <int MT>
__device__ __forceinline__ void take_weights(const float (&norms)[MT][2], Tile<MT>& c) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][m][i] = exp2_fast(c[j][m][i] - norms[m][i / 2]);
    }
  }
}

// ---- the state ----

// The larger of `value` and what is there, by their bits, whose order is that of numbers that are not negative. NaN
// stays.
__device__ __forceinline__ void raise_to(float* state, float before, float value) {
  if (before != before) return;
  atomicMax(reinterpret_cast<int*>(state), value != value ? 0x7fffffff : __float_as_int(value));
}

// One look-ahead row's sums of 16 positions: this lane's are t, t + 1, t + 8 and t + 9, in the prompt where `here` says
// so.
__device__ __forceinline__ void fold_row(const ScoreParams& p, const ScoreItem& item, int n, int t, float (&best)[4],
                                         const bool (&here)[4], int lane) {
  // The maximum over the heads that lie in other lanes, and over the rows too where the state has one for all.
  const int span = p.state_rows == 1 ? 1 : 1 << p.rows.span_bits;
#pragma unroll 1
  for (int step = 4 * span; step < kWarp; step *= 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] = max_nan(best[i], __shfl_xor_sync(kAllLanes, best[i], step));
  }
  const int row = p.state_rows == 1 ? 0 : n;
  if (lane / 4 >= span || (p.state_rows != 1 && n >= item.rows)) return;
  float* state = p.state + item.b * p.state_stride_batch + row * p.state_stride_row + t;
  float before[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) before[i] = here[i] ? load_relaxed(state + i / 2 * 8 + i % 2) : 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Few values of many layers and heads are the largest so far, so most end with the read.
    if (here[i] && !(best[i] <= before[i])) raise_to(state + i / 2 * 8 + i % 2, before[i], best[i]);
  }
}

// Sums of 16 positions from `first` on, all rows of the job, into the state: positions [from, to) of them.
template <int MT>
__device__ __forceinline__ void fold(const ScoreParams& p, const ScoreItem& item, const float (&sums)[2][MT][4],
                                     int first, int from, int to, int lane) {
  const int t = first + lane % 4 * 2;
  bool here[4];
  float part[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = t + i / 2 * 8 + i % 2;
    here[i] = at >= from && at < to;
    part[i] = p.pool_part;
    if (p.pool_part == 0.0f) {
      const int low = max(at - p.half, 0), high = min(at + p.half, item.length - 1);
      part[i] = reciprocal_fast(static_cast<float>(max(high - low + 1, 1)));
    }
  }
  // Octets of the same look-ahead rows go into the state together; mostly these are all.
  const int octets = min(2 * MT, p.rows.octets - item.first.octet);
  int begin = 0, end = p.rows.octets_across - item.first.across, span = item.first.span;
#pragma unroll 1
  for (; begin < octets; ++span, begin = end, end += p.rows.octets_across) {
    float best[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int o = 0; o < 2 * MT; ++o) {
      if (o < begin || o >= end || o >= octets) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) best[i] = max_nan(best[i], sums[i / 2][o / 2][o % 2 * 2 + i % 2]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) best[i] *= part[i];
    fold_row(p, item, (span << p.rows.span_bits) + (lane / 4 & ((1 << p.rows.span_bits) - 1)), t, best, here, lane);
  }
  __syncwarp();  // lanes have left fold_row one by one, and products take them all
}

}  // namespace specprefill
