// Which keys the rows of a job see, and their queries as tensor cores take them.
#pragma once

#include "common/ptx.cuh"
#include "score/params.cuh"
#include "specprefill.h"

namespace specprefill {

// Octets in their order: all heads at the first rows, then at the next. No division on the way.
struct OctetCursor {
  int32_t octet;         // of the KV head
  int32_t span, across;  // which rows, which heads

  __device__ __forceinline__ void advance(const ScoreParams& p) {
    ++octet;
    if (++across == p.rows.octets_across) {
      across = 0;
      ++span;
    }
  }
};

// One item: a layer, a sequence, a KV head, and a block of its rows.
struct ScoreItem {
  int32_t layer, b, head;
  OctetCursor first;
  int32_t length, rows;    // prompt tokens, valid look-ahead rows
  int32_t readable;        // keys that the softmax may count
  int32_t base;            // position of row 0
  int64_t start;           // packed: the sequence's first token
  int32_t window;          // row n sees keys behind base + n - window
  int32_t seen_by_all[2];  // keys that every row sees, from and to
  bool all_rows;           // no row of the job is padding
};

struct ScoreRow {
  int32_t n, head;  // look-ahead row, query head of the KV head's group
  bool valid;
};

// Row `lane_row` (0 to 7) of an octet.
__device__ __forceinline__ ScoreRow row_of(const ScoreParams& p, const ScoreItem& item, const OctetCursor& at,
                                           int lane_row) {
  const int n = (at.span << p.rows.span_bits) + (lane_row & ((1 << p.rows.span_bits) - 1));
  const int head = at.across * (8 >> p.rows.span_bits) + (lane_row >> p.rows.span_bits);
  return {n, head, n < item.rows && head < p.group && at.octet < p.rows.octets};
}

// Where a sequence lies, clamped to the buffers, whatever the device's tables say.
struct ScoreSequence {
  int64_t start;  // packed: its first token
  int32_t length, rows, readable;
};

__device__ __forceinline__ ScoreSequence sequence_of(const ScoreParams& p, int b) {
  ScoreSequence sequence;
  int64_t room = p.room;
  sequence.start = 0;
  if (p.cu_seqlens) {
    const int64_t start = p.cu_seqlens[b], stop = p.cu_seqlens[b + 1];
    const int64_t end = stop < room ? stop : room;
    room = start >= 0 && end > start ? end - start : 0;
    sequence.start = start > 0 ? start : 0;
  }
  sequence.rows = p.look_ahead;
  if (p.num_look_ahead) sequence.rows = max(min(p.num_look_ahead[b], p.look_ahead), 0);
  const int32_t behind = p.counts_look_ahead ? max(sequence.rows - 1, 0) : 0;
  int64_t length = room - behind < p.max_len ? room - behind : p.max_len;
  if (p.seq_lens && p.seq_lens[b] < length) length = p.seq_lens[b];
  sequence.length = length > 0 ? static_cast<int32_t>(length) : 0;
  sequence.readable = sequence.length > 0 ? sequence.length + behind : 0;
  return sequence;
}

template <int MT>
__device__ __forceinline__ ScoreItem item_of(const ScoreParams& p, int32_t index) {
  ScoreItem item;
  item.first.octet = index % p.rows.blocks * 2 * MT;
  item.first.span = item.first.octet / p.rows.octets_across;
  item.first.across = item.first.octet % p.rows.octets_across;
  index /= p.rows.blocks;
  item.head = index % p.kv_heads;
  index /= p.kv_heads;
  item.b = index % p.batch;
  item.layer = index / p.batch;

  const ScoreSequence sequence = sequence_of(p, item.b);
  item.start = sequence.start;
  item.length = sequence.length;
  item.rows = sequence.rows;
  item.readable = sequence.readable;
  item.base = p.observation ? item.length - item.rows : item.length - 1;
  item.window = p.layers[item.layer].window;

  // Every row: from the last row's window on, up to the first row's position.
  const int last = item.base + item.rows - 1;
  item.seen_by_all[0] = max(last - item.window + 1, 0);
  item.seen_by_all[1] = item.base + 1;
  const int span = 1 << p.rows.span_bits;
  item.all_rows = item.rows == p.look_ahead && p.look_ahead % span == 0 && p.group % (8 >> p.rows.span_bits) == 0 &&
                  item.first.octet + 2 * MT <= p.rows.octets;
  return item;
}

// First key that any row sees.
__device__ __forceinline__ int32_t first_seen(const ScoreItem& item) { return max(item.base - item.window + 1, 0); }

__device__ __forceinline__ float query_element(const ScoreParams& p, const void* query, int64_t at) {
  if (p.query_dtype == SPECPREFILL_F32) return static_cast<const float*>(query)[at];
  const uint16_t bits = static_cast<const uint16_t*>(query)[at];
  return p.query_dtype == SPECPREFILL_F16 ? f16_to_float(bits) : __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

// The next bf16 of a number that is a sum of them, by cutting off: exact, as what is left is. NaN and Inf are all in
// the first one.
__device__ __forceinline__ float take_bf16(float& x) {
  const float part = x != x ? x : __uint_as_float(__float_as_uint(x) & 0xffff0000u);
  const float rest = __fadd_rn(x, -part);
  x = rest != rest ? 0.0f : rest;
  return part;
}

// Two numbers of type bf16 (already cut) or fp16 in one register.
template <bool kHalf>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return kHalf ? pack_f16(low, high) : pack_bf16(low, high);
}

// The queries of an item as A fragments [part][MT][fragment][lane] of four registers, where a lane finds what it needs
// as 16 bytes.
//
// The order of the head dimensions inside a fragment is ours, as long as queries and keys agree: lane thread t holds
// four that lie side by side, because a lane's 16 bytes of a key then are whole fragments (see keys.cuh).
template <class Keys, int MT>
__device__ __forceinline__ void load_queries(const ScoreParams& p, const ScoreItem& item, uint4* fragments, int warp,
                                             int lane) {
  constexpr int kLaneDims = 16 / Keys::kBytes;  // head dimensions in 16 bytes of a key
  constexpr int kPerChunk = kLaneDims / 4;      // fragments of 64 bytes
  const auto* query = static_cast<const unsigned char*>(p.layers[item.layer].query);
  const int bytes = p.query_dtype == SPECPREFILL_F32 ? 4 : 2;
  OctetCursor octet = item.first;
#pragma unroll 1
  for (int m = 0; m < MT; ++m) {
    bool valid[2];
    const unsigned char* from[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const ScoreRow row = row_of(p, item, octet, lane / 4);
      octet.advance(p);
      valid[h] = row.valid;
      from[h] = query + bytes * (item.b * p.query_stride_batch + row.n * p.query_stride_row +
                                 (static_cast<int64_t>(item.head) * p.group + row.head) * p.query_stride_head);
    }
#pragma unroll 1
    for (int fragment = warp; fragment < p.query_fragments; fragment += kScoreWarps) {
      const int dim = fragment / kPerChunk * 4 * kLaneDims + lane % 4 * kLaneDims + fragment % kPerChunk * 4;
      uint4* to = fragments + (m * p.query_fragments + fragment) * kWarp + lane;
      if (p.query_is_ready) {  // four numbers of the type that is multiplied, 8 bytes
        const uint2 none = make_uint2(0, 0);
        const uint2 x = valid[0] && dim < p.head_dim ? *reinterpret_cast<const uint2*>(from[0] + 2 * dim) : none;
        const uint2 y = valid[1] && dim < p.head_dim ? *reinterpret_cast<const uint2*>(from[1] + 2 * dim) : none;
        *to = make_uint4(x.x, y.x, x.y, y.y);
        continue;
      }
      float x[2][4];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const bool there = valid[h] && dim + d < p.head_dim;
          x[h][d] = there ? query_element(p, from[h], (dim + d) * p.query_stride_dim) : 0.0f;
        }
      }
#pragma unroll 1
      for (int part = 0; part < p.query_parts; ++part) {
        float y[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int d = 0; d < 4; ++d) y[h][d] = Keys::kHalf ? x[h][d] : take_bf16(x[h][d]);
        }
        to[part * MT * p.query_fragments * kWarp] =
            make_uint4(pack<Keys::kHalf>(y[0][0], y[0][1]), pack<Keys::kHalf>(y[1][0], y[1][1]),
                       pack<Keys::kHalf>(y[0][2], y[0][3]), pack<Keys::kHalf>(y[1][2], y[1][3]));
      }
    }
  }
}

}  // namespace specprefill
