// Keys: from any layout into shared memory, beside the arithmetic, and from there into tensor cores.
#pragma once

#include "common/ptx.cuh"
#include "score/params.cuh"
#include "score/rows.cuh"

namespace specprefill {

// ---- element types ----
//
// A type says how 16 bytes of a key's row (four lanes hold 64 bytes, a "chunk") become B fragments: register pair s of
// a lane holds its dimensions 4s to 4s + 3. Where a key's elements are no bf16 (or fp16, when all is), they are sums of
// kParts bf16: the product of two sums leaves out what is below 2^-24 of it.

struct KeysBf16 {
  static constexpr int kBytes = 2, kParts = 1;
  static constexpr bool kHalf = false;
  static __device__ __forceinline__ void fragment(const uint4& raw, int s, bool, uint32_t (&b)[kParts][2]) {
    b[0][0] = s == 0 ? raw.x : raw.z;
    b[0][1] = s == 0 ? raw.y : raw.w;
  }
};

struct KeysF16 {
  static constexpr int kBytes = 2, kParts = 1;
  static constexpr bool kHalf = true;
  static __device__ __forceinline__ void fragment(const uint4& raw, int s, bool e5m2, uint32_t (&b)[kParts][2]) {
    KeysBf16::fragment(raw, s, e5m2, b);
  }
};

// fp8 beside fp16 queries (kHalf_) or bf16 and fp32 ones: both types hold every fp8 exactly.
template <bool kHalf_>
struct KeysF8 {
  static constexpr int kBytes = 1, kParts = 1;
  static constexpr bool kHalf = kHalf_;
  static __device__ __forceinline__ void fragment(const uint4& raw, int s, bool e5m2, uint32_t (&b)[kParts][2]) {
    const uint32_t word = s == 0 ? raw.x : s == 1 ? raw.y : s == 2 ? raw.z : raw.w;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t two = f8_pair_to_f16(i ? word >> 16 : word & 0xffffu, e5m2);
      b[0][i] = kHalf ? two : pack_bf16(f16_to_float(two & 0xffffu), f16_to_float(two >> 16));
    }
  }
};

// fp16 beside bf16 or fp32 queries.
struct KeysSplitF16 {
  static constexpr int kBytes = 2, kParts = 2;
  static constexpr bool kHalf = false;
  static __device__ __forceinline__ void fragment(const uint4& raw, int s, bool, uint32_t (&b)[kParts][2]) {
    const uint32_t words[2] = {s == 0 ? raw.x : raw.z, s == 0 ? raw.y : raw.w};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float low = f16_to_float(words[i] & 0xffffu), high = f16_to_float(words[i] >> 16);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const float x = take_bf16(low), y = take_bf16(high);
        b[part][i] = pack_bf16(x, y);
      }
    }
  }
};

struct KeysF32 {
  static constexpr int kBytes = 4, kParts = 3;
  static constexpr bool kHalf = false;
  static __device__ __forceinline__ void fragment(const uint4& raw, int, bool, uint32_t (&b)[kParts][2]) {
    float x[4] = {__uint_as_float(raw.x), __uint_as_float(raw.y), __uint_as_float(raw.z), __uint_as_float(raw.w)};
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float y[4];
#pragma unroll
      for (int d = 0; d < 4; ++d) y[d] = take_bf16(x[d]);
      b[part][0] = pack_bf16(y[0], y[1]);
      b[part][1] = pack_bf16(y[2], y[3]);
    }
  }
};

// ---- staging ----

// A warp's stages: lines of 32 keys, and which of the keys are there.
struct KeyStages {
  unsigned char* lines;  // [stages][key][kLineBytes]
  uint32_t* present;     // [stages] one bit a key
};

// Where 16 bytes lie in a stage. Lanes read the same 64 bytes of two neighbouring keys together: the swap puts them
// into different halves of the 32 banks.
__device__ __forceinline__ int staged_at(int key, int unit) {
  return key * kLineBytes + ((unit ^ (key & 1) << 2) * 16);
}

// Whether position t has a key, and its byte offset from the KV head's first one.
__device__ __forceinline__ bool find_key(const ScoreParams& p, const ScoreItem& item, int t, int limit,
                                         int64_t& offset) {
  offset = 0;
  if (t < 0 || t >= limit) return false;
  if (!p.block_size) {
    offset = (item.start + t) * p.key_stride_token;
    return true;
  }
  const int64_t block = p.block_table[item.b * p.block_table_stride + t / p.block_size];
  if (block < 0 || block >= p.num_blocks) return false;
  offset = block * p.key_stride_row + t % p.block_size * p.key_stride_token;
  return true;
}

// 16 bytes of a key, element by element: for keys that are not contiguous or lie at odd addresses.
template <int kBytes>
__device__ __forceinline__ void copy_elements(const ScoreParams& p, unsigned char* to, const unsigned char* key,
                                              int first_byte, bool there) {
#pragma unroll 1
  for (int at = 0; at < 16; at += kBytes) {
    const int64_t d = (first_byte + at) / kBytes;
    const unsigned char* from = key + d * p.key_stride_dim;
    const bool read = there && d < p.head_dim;
    if constexpr (kBytes == 1) {
      to[at] = read ? *from : 0;
    } else if constexpr (kBytes == 2) {
      *reinterpret_cast<uint16_t*>(to + at) = read ? *reinterpret_cast<const uint16_t*>(from) : 0;
    } else {
      *reinterpret_cast<uint32_t*>(to + at) = read ? *reinterpret_cast<const uint32_t*>(from) : 0;
    }
  }
}

// A warp's walk through keys: stages are queued ahead of the arithmetic, step by step, and in a step line by line.
struct KeyWalk {
  const unsigned char* base;  // the KV head's first key
  int32_t next, line;         // first key of the step that is queued next, and its line
  int32_t stop;               // behind the last step
  int32_t limit;              // keys from here on are not there
  int64_t offset;             // of this lane's key in the step that is being queued
  bool there;
};

__device__ __forceinline__ KeyWalk key_walk(const ScoreParams& p, const ScoreItem& item, int first, int steps,
                                            int limit) {
  KeyWalk walk;
  walk.base = static_cast<const unsigned char*>(p.layers[item.layer].key) + item.head * p.key_stride_head;
  if (!p.block_size && !p.cu_seqlens) walk.base += item.b * p.key_stride_row;
  walk.next = first;
  walk.line = 0;
  walk.stop = first + steps * kStepKeys;
  walk.limit = limit;
  walk.offset = 0;
  walk.there = false;
  return walk;
}

// Queues the next stage into `slot`; behind the last one nothing, but still a group that can be waited for.
template <class Keys>
__device__ __forceinline__ void queue_stage(const ScoreParams& p, const ScoreItem& item, KeyWalk& walk,
                                            const KeyStages& stages, int slot, int lane) {
  if (walk.next < walk.stop) {
    if (walk.line == 0) walk.there = find_key(p, item, walk.next + lane, walk.limit, walk.offset);
    const uint32_t present = __ballot_sync(kAllLanes, walk.there);
    if (lane == 0) stages.present[slot] = present;
    const int first = lane >> 3, unit = lane & 7;  // this lane has every fourth key
    const int first_byte = walk.line * kLineBytes + unit * 16;
    const int bytes = max(min(p.key_row_bytes - first_byte, 16), 0);
    unsigned char* to = stages.lines + slot * kStageBytes + staged_at(first, unit);
    if (p.key_is_aligned && present == kAllLanes && !p.block_size) {
      // One after the other: the first one's address is enough.
      const unsigned char* from = walk.base;
      if (bytes) from += walk.offset + (first - lane) * p.key_stride_token + first_byte;
      const int64_t step = bytes ? 4 * p.key_stride_token : 0;
#pragma unroll 4
      for (int i = 0; i < kStepKeys / 4; ++i, from += step) copy_async_16(to + i * 4 * kLineBytes, from, bytes);
    } else {
#pragma unroll 1
      for (int i = 0; i < kStepKeys / 4; ++i) {
        const int key = i * 4 + first;
        const unsigned char* from = walk.base + __shfl_sync(kAllLanes, walk.offset, key);
        const bool there = present >> key & 1;
        if (p.key_is_aligned) {
          copy_async_16(to + i * 4 * kLineBytes, there && bytes ? from + first_byte : walk.base, there ? bytes : 0);
        } else {
          copy_elements<Keys::kBytes>(p, to + i * 4 * kLineBytes, from, first_byte, there);
        }
      }
    }
    if (++walk.line == p.lines) {
      walk.line = 0;
      walk.next += kStepKeys;
    }
  }
  copy_async_commit();
}

}  // namespace specprefill
