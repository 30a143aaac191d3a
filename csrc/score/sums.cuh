// First pass: each row's maximum and sum of exponentials, key by key, joined in an order that never changes.
#pragma once

#include "common/ptx.cuh"
#include "score/params.cuh"
#include "score/tile.cuh"

namespace specprefill {

// A sum of 2^x, kept beside the largest x: sum * 2^maximum. Nothing yet: (-Inf, 0).
__device__ __forceinline__ float2 join_sums(float2 a, float2 b) {
  const float m = fmaxf(a.x, b.x);
  // Against the difference of two infinities where nothing has been seen.
  const float above = m == -INFINITY ? 0.0f : m;
  return make_float2(m, __fadd_rn(__fmul_rn(a.y, exp2_fast(a.x - above)), __fmul_rn(b.y, exp2_fast(b.x - above))));
}

// A lane's sums, over the columns it has: [16 rows][row g, row g + 8]
template <int MT>
struct LaneSums {
  float2 of[MT][2];

  static __device__ __forceinline__ LaneSums none() {
    LaneSums sums;
#pragma unroll
    for (int m = 0; m < MT; ++m) sums.of[m][0] = sums.of[m][1] = make_float2(-INFINITY, 0.0f);
    return sums;
  }

  // Logits of a step; -Inf where a row sees no key.
  __device__ __forceinline__ void add(const Tile<MT>& c) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2& sum = of[m][h];
        float most = sum.x;
#pragma unroll
        for (int j = 0; j < kColumns; ++j) most = fmaxf(most, fmaxf(c[j][m][2 * h], c[j][m][2 * h + 1]));
        const float above = most == -INFINITY ? 0.0f : most;
        float total = __fmul_rn(sum.y, exp2_fast(sum.x - above));
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          total += exp2_fast(c[j][m][2 * h] - above) + exp2_fast(c[j][m][2 * h + 1] - above);
        }
        sum = make_float2(most, total);
      }
    }
  }

  // Joins the four lanes of each row, and writes what the warp has seen: [rows of the job]
  __device__ __forceinline__ void write(float2* out, int lane) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2 sum = of[m][h];
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          const float2 other =
              make_float2(__shfl_xor_sync(kAllLanes, sum.x, step), __shfl_xor_sync(kAllLanes, sum.y, step));
          sum = join_sums(sum, other);
        }
        if (lane % 4 == 0) out[m * 16 + h * 8 + lane / 4] = sum;
      }
    }
  }
};

// Joins an item's partial sums, one warp a row: lanes take every 32nd, then halves. The order follows from the number
// of partial sums that the sequence has, so a batch gets what its sequences get alone.
template <int MT>
__device__ __forceinline__ void write_norms(const ScoreParams& p, int32_t item, int32_t count, int warp, int lane) {
  constexpr int kRows = 16 * MT;
  for (int row = warp; row < kRows; row += kScoreWarps) {
    const float2* partials = p.partials + static_cast<int64_t>(item) * p.sum_jobs * kRows + row;
    float2 sum = make_float2(-INFINITY, 0.0f);
    for (int i = lane; i < count; i += kWarp) sum = join_sums(sum, __ldcg(partials + static_cast<int64_t>(i) * kRows));
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const float2 other =
          make_float2(__shfl_xor_sync(kAllLanes, sum.x, step), __shfl_xor_sync(kAllLanes, sum.y, step));
      sum = join_sums(sum, other);
    }
    // A row that saw no key gets -Inf, and no weight is ever taken of it.
    if (lane == 0)
      p.norms[static_cast<int64_t>(item) * kRows + row] = sum.x == -INFINITY ? -INFINITY : sum.x + log2f(sum.y);
  }
}

}  // namespace specprefill
