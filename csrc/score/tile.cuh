// Logits of a warp's rows and 32 keys, and what a row sees of them.
#pragma once

#include "common/ptx.cuh"
#include "score/keys.cuh"
#include "score/params.cuh"
#include "score/rows.cuh"

namespace specprefill {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kColumns = kStepKeys / 8;  // blocks of keys

// [block of 8 keys][16 rows][see mma in ptx.cuh]
template <int MT>
using Tile = float[kColumns][MT][4];

template <int MT>
__device__ __forceinline__ void clear(Tile<MT>& c) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][m][i] = 0.0f;
    }
  }
}

template <class Keys>
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, const uint32_t (&b)[2]) {
  const uint32_t four[4] = {a.x, a.y, a.z, a.w};
  if constexpr (Keys::kHalf) {
    mma_f16(c, four, b[0], b[1]);
  } else {
    mma_bf16(c, four, b[0], b[1]);
  }
}

// Adds the products of one staged line.
template <class Keys, int MT>
__device__ __forceinline__ void multiply_line(const ScoreParams& p, const uint4* queries, const unsigned char* stage,
                                              int line, int lane, Tile<MT>& c) {
  constexpr int kPerChunk = 4 / Keys::kBytes;  // fragments
  const int part_size = MT * p.query_fragments * kWarp;
  const auto multiply_chunk = [&](int half, const uint4* of_part, int first_part, int parts) {
    const uint4* from = of_part + (line * 2 + half) * kPerChunk * kWarp + lane;
    uint4 raw[kColumns];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      raw[j] = *reinterpret_cast<const uint4*>(stage + staged_at(j * 8 + lane / 4, half * 4 + lane % 4));
    }
#pragma unroll
    for (int s = 0; s < kPerChunk; ++s) {
      uint32_t b[kColumns][Keys::kParts][2];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) Keys::fragment(raw[j], s, p.key_e5m2, b[j]);
#pragma unroll 1
      for (int part = first_part; part < parts; ++part) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const uint4 a = from[(part - first_part) * part_size + (m * p.query_fragments + s) * kWarp];
#pragma unroll
          for (int key_part = 0; key_part < Keys::kParts; ++key_part) {
            if (Keys::kParts > 1 && part + key_part > 2) break;
#pragma unroll
            for (int j = 0; j < kColumns; ++j) multiply<Keys>(c[j][m], a, b[j][key_part]);
          }
        }
      }
    }
  };
  const int halves = min(p.chunks - line * 2, 2);
  if constexpr (Keys::kParts > 1) {
#pragma unroll 1
    for (int half = 0; half < halves; ++half) multiply_chunk(half, queries, 0, p.query_parts);
  } else {
    // Queries mostly are one part; the keys of more are as soon read again as kept.
#pragma unroll 1
    for (int part = 0; part < p.query_parts; ++part, queries += part_size) {
      if constexpr (kPerChunk >
                    2) {  // 32 products or more: the loop costs nothing, and two at a time too many registers
#pragma unroll 1
        for (int half = 0; half < halves; ++half) multiply_chunk(half, queries, 0, 1);
      } else {
        multiply_chunk(0, queries, 0, 1);
        if (halves > 1) multiply_chunk(1, queries, 0, 1);
      }
    }
  }
}

// tanh by exp2, and by its series near 0, where the difference from 1 is lost. Relative error below 2e-6.
__device__ __forceinline__ float tanh_fast(float x) {
  const float square = x * x;
  const float series = x * (1.0f + square * (-1.0f / 3 + square * (2.0f / 15 + square * (-17.0f / 315))));
  return square < 0.01f ? series : 1.0f - 2.0f * reciprocal_fast(exp2_fast(x * (2 * kLog2E)) + 1.0f);
}

// Dot products into logits times log2(e). `factor` holds the scale, of keys too, and log2(e), or with a softcap its
// inverse. Products that are rounded by themselves: both passes must see the same logit, so that one that is the whole
// sum gets a weight of 1.
template <int MT>
__device__ __forceinline__ void scale_logits(float factor, float softcap, Tile<MT>& c) {
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][m][i] = __fmul_rn(c[j][m][i], factor);
    }
  }
  if (softcap == 0.0f) return;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[j][m][i] = __fmul_rn(softcap * kLog2E, tanh_fast(c[j][m][i]));
    }
  }
}

__device__ __forceinline__ float logit_factor(const ScoreParams& p, const ScoreItem& item) {
  const ScoreLayer& layer = p.layers[item.layer];
  const float scale = layer.key_scale ? layer.scale * layer.key_scale[item.head * p.key_scale_stride] : layer.scale;
  return p.softcap == 0.0f ? scale * kLog2E : scale / p.softcap;
}

// Whether every row sees all of a step's keys, so that nothing needs a mask.
__device__ __forceinline__ bool seen_whole(const ScoreItem& item, int first_key, uint32_t present) {
  return item.all_rows && present == kAllLanes && first_key >= item.seen_by_all[0] &&
         first_key + kStepKeys <= item.seen_by_all[1];
}

// Puts `hidden` where a row sees no key.
template <int MT>
__device__ __forceinline__ void hide_unseen(const ScoreParams& p, const ScoreItem& item, int first_key,
                                            uint32_t present, float hidden, int lane, Tile<MT>& c) {
  OctetCursor octet = item.first;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const ScoreRow row = row_of(p, item, octet, lane / 4);
      octet.advance(p);
      const int last = row.valid ? item.base + row.n : -1, before = last - item.window;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = j * 8 + lane % 4 * 2 + i, t = first_key + key;
          if (!(present >> key & 1) || t > last || t <= before) c[j][m][2 * h + i] = hidden;
        }
      }
    }
  }
}

}  // namespace specprefill
