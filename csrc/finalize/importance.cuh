// Importance of four neighbouring tokens at a time, for the kernels that make it from the state: finalize and select.
#pragma once

#include "common/device.cuh"
#include "common/ptx.cuh"

namespace specprefill {

// Entry b of `lengths` within [least, most], or `most` where there are none. An empty slot of a padded batch has the
// length 0, whatever the memory says: nothing of it is kept.
__device__ __forceinline__ int clamped_length(const int32_t* lengths, unsigned b, int most, int least) {
  return lengths ? min(max(lengths[b], least), most) : most;
}

// What importance is made from. As state of one row with the maximum for `reduce`, importance is made from itself.
struct ImportanceSource {
  const float* state;             // [B, N, T]; strides count elements
  const int32_t* seq_lens;        // [B] or null
  const int32_t* num_look_ahead;  // [B] or null
  int64_t stride_batch, stride_row, stride_token;
  int look_ahead, max_len;  // N, T
  int half;                 // tokens on each side of a pooling window, within T
  float divisor;            // what a window's sum is divided by; 0: the tokens inside
  bool mean, pooled;
  bool wide;  // rows are contiguous and start at multiples of 16 bytes
};

struct Four {
  float x[4];
};

// Whether the tokens t to t + 3 are one load: what lies between a sequence's length and the end of the buffer may be
// read, and counts for nothing.
__device__ __forceinline__ bool is_wide(const ImportanceSource& s, int t) { return s.wide && t <= s.max_len - 4; }

// Tokens t to t + 3 of a row; what lies behind `length` is anything.
__device__ __forceinline__ Four load_four(const ImportanceSource& s, bool wide, const float* row, int t, int length) {
  Four four;
  if (wide) {
    const float4 all = *reinterpret_cast<const float4*>(row + t);
    four.x[0] = all.x, four.x[1] = all.y, four.x[2] = all.z, four.x[3] = all.w;
  } else {
    row += t * s.stride_token;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.x[i] = t < length - i ? row[i * s.stride_token] : 0.0f;
  }
  return four;
}

__device__ __forceinline__ void fold(Four& total, const Four& row, bool mean) {
#pragma unroll
  for (int i = 0; i < 4; ++i) total.x[i] = mean ? total.x[i] + row.x[i] : max_nan(total.x[i], row.x[i]);
}

// Rows whose loads are on their way together: the usual look-ahead of 8 is one trip to memory, or two of narrow loads.
constexpr int kWideRowsAtOnce = 8, kNarrowRowsAtOnce = 4;
// With a window, four sums of each row stay in registers beside the loads.
constexpr int kPooledRowsAtOnce = 2;

template <bool kWide>
__device__ __forceinline__ Four reduce_rows(const ImportanceSource& s, const float* state, int rows, int t,
                                            int length) {
  const float identity = s.mean ? 0.0f : -INFINITY;
  Four total{{identity, identity, identity, identity}};
  constexpr int kRowsAtOnce = kWide ? kWideRowsAtOnce : kNarrowRowsAtOnce;
  for (int n = 0; n < rows; n += kRowsAtOnce) {
    Four row[kRowsAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (n + i < rows) row[i] = load_four(s, kWide, state + (n + i) * s.stride_row, t, length);
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i) {
      if (n + i < rows) fold(total, row[i], s.mean);
    }
  }
  return total;
}

// The same with each row pooled first. A window is summed from left to right, so that the sum depends on nothing but
// what it holds; four windows share their loads, of which all but one in w / 4 + 1 are out of the first-level cache.
__device__ __forceinline__ Four reduce_pooled_rows(const ImportanceSource& s, const float* state, int rows, int t,
                                                   int length) {
  const float identity = s.mean ? 0.0f : -INFINITY;
  Four total{{identity, identity, identity, identity}};
  const int half = min(s.half, length - 1);  // a wider window holds everything wherever it is centred
  const int first = max(t - half, 0) & ~3;
  const int last = static_cast<int>(min(static_cast<int64_t>(t) + 3 + half, static_cast<int64_t>(length) - 1));
  for (int n = 0; n < rows; n += kPooledRowsAtOnce) {
    Four sums[kPooledRowsAtOnce] = {};
    for (int left = last - first, at = first; left >= 0; left -= 4, at += left >= 0 ? 4 : 0) {  // 2^31 is never reached
      Four row[kPooledRowsAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kPooledRowsAtOnce; ++i) {
        if (n + i < rows) {
          row[i] = load_four(s, is_wide(s, at), state + (n + i) * s.stride_row, at, length);
        }
      }
#pragma unroll
      for (int from = 0; from < 4; ++from) {
#pragma unroll
        for (int to = 0; to < 4; ++to) {
          const int apart = at - t + (from - to);
          const bool inside = apart <= half && -apart <= half && at < length - from;
#pragma unroll
          for (int i = 0; i < kPooledRowsAtOnce; ++i) {
            if (inside) sums[i].x[to] += row[i].x[from];
          }
        }
      }
    }
#pragma unroll
    for (int to = 0; to < 4; ++to) {
      const int64_t centre = static_cast<int64_t>(t) + to;
      const int64_t inside = min(centre + half, static_cast<int64_t>(length) - 1) - max(centre - half, int64_t{0}) + 1;
      // Behind the length there may be none inside; what comes out there is dropped.
      const float divisor = s.divisor != 0 ? s.divisor : static_cast<float>(max(inside, int64_t{1}));
#pragma unroll
      for (int i = 0; i < kPooledRowsAtOnce; ++i) sums[i].x[to] /= divisor;
    }
#pragma unroll
    for (int i = 0; i < kPooledRowsAtOnce; ++i) {
      if (n + i < rows) fold(total, sums[i], s.mean);
    }
  }
  return total;
}

// Importance of the tokens t to t + 3 of sequence b, for t >= 0, a multiple of 4 where rows are wide; 0 from `length`
// on. `rows`: those of the state that count.
__device__ __forceinline__ Four importance_of_four(const ImportanceSource& s, unsigned b, int rows, int t, int length) {
  Four total{};
  if (t >= length) return total;
  const float* state = s.state + b * s.stride_batch;
  if (s.pooled) {
    total = reduce_pooled_rows(s, state, rows, t, length);
  } else {
    total =
        is_wide(s, t) ? reduce_rows<true>(s, state, rows, t, length) : reduce_rows<false>(s, state, rows, t, length);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (s.mean) total.x[i] /= static_cast<float>(rows);
    if (t >= length - i) total.x[i] = 0;
  }
  return total;
}

}  // namespace specprefill
