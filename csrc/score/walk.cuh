// A warp's walk through keys, and what each pass makes of a step.
#pragma once

#include "score/pool.cuh"
#include "score/sums.cuh"

namespace specprefill {

enum class ScorePass { kSum, kPool, kPoolWide };

// Stages of a warp: one that is read, others on their way. With three, an SM of an H100 has room for three blocks of 32
// rows at D = 128 (59 KiB each), which then have 96 KiB of keys on their way, five times what its share of memory's
// rate needs. Keys that are sums of parts cost so much arithmetic that two are enough.
template <class Keys>
constexpr int kScoreStages = Keys::kParts == 1 ? 3 : 2;

// What a pass keeps from step to step, in the same registers for all three: a lane's sums of rows, the last 16 keys'
// weights, or the sums of 16 positions.
template <int MT>
struct ScoreCarry {
  uint32_t bits[MT][8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 8; ++i) bits[m][i] = 0;
    }
  }

  __device__ __forceinline__ LaneSums<MT> sums() const {
    LaneSums<MT> out;
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        out.of[m][h] = make_float2(__uint_as_float(bits[m][2 * h]), __uint_as_float(bits[m][2 * h + 1]));
      }
    }
    return out;
  }
  __device__ __forceinline__ void keep(const LaneSums<MT>& sums) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        bits[m][2 * h] = __float_as_uint(sums.of[m][h].x);
        bits[m][2 * h + 1] = __float_as_uint(sums.of[m][h].y);
      }
    }
  }

  __device__ __forceinline__ Weights weights(int m) const {
    Weights out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.high[i] = bits[m][i], out.low[i] = bits[m][4 + i];
    return out;
  }
  __device__ __forceinline__ void keep(int m, const Weights& weights) {
#pragma unroll
    for (int i = 0; i < 4; ++i) bits[m][i] = weights.high[i], bits[m][4 + i] = weights.low[i];
  }

  __device__ __forceinline__ void positions(int block, float (&out)[MT][4]) const {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[m][i] = __uint_as_float(bits[m][block * 4 + i]);
    }
  }
  __device__ __forceinline__ void keep(int block, const float (&positions)[MT][4]) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[m][block * 4 + i] = __float_as_uint(positions[m][i]);
    }
  }
};

// A warp's part of a job.
template <int MT>
struct ScoreWalk {
  ScorePass pass;
  int first, steps, limit;  // keys
  int from, to;             // positions that the warp owns (pool passes); a wide pool has 16 from `from` on
  float factor;
  float norms[MT][2];
};

// What a step's weights add to 16 positions that lie between it and the one before.
template <int MT>
__device__ __forceinline__ void pool_step(const ScoreParams& p, const ScoreItem& item, const ScoreWalk<MT>& walk,
                                          const uint4* bands, int first_key, const Tile<MT>& c, ScoreCarry<MT>& carry,
                                          int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + 16 * half, first = key - kHalo;
    Weights now[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) now[m].take(c, 2 * half, m);
    if (first + 16 > walk.from && first < walk.to) {
      float sums[2][MT][4] = {};
      const uint4 before = bands[lane], own = bands[kWarp + lane];
      const uint32_t band[2][2][2] = {{{before.x, before.y}, {before.z, before.w}}, {{own.x, own.y}, {own.z, own.w}}};
#pragma unroll
      for (int block = 0; block < 2; ++block) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          carry.weights(m).add_to(sums[block][m], band[0][block]);
          now[m].add_to(sums[block][m], band[1][block]);
        }
      }
      fold<MT>(p, item, sums, first, walk.from, walk.to, lane);
    }
#pragma unroll
    for (int m = 0; m < MT; ++m) carry.keep(m, now[m]);
  }
}

// What a step's weights add to the 16 positions from walk.from on, wherever they lie.
template <int MT>
__device__ __forceinline__ void pool_step_wide(const ScoreParams& p, const ScoreWalk<MT>& walk, int first_key,
                                               const Tile<MT>& c, ScoreCarry<MT>& carry, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      uint32_t band[2];
      make_band(first_key + 16 * half, walk.from + 8 * block, p.half, lane, band);
      float sums[MT][4];
      carry.positions(block, sums);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        Weights now;
        now.take(c, 2 * half, m);
        now.add_to(sums[m], band);
      }
      carry.keep(block, sums);
    }
  }
}

template <class Keys, int MT>
__device__ __forceinline__ void walk_keys(const ScoreParams& p, const ScoreItem& item, const uint4* queries,
                                          const KeyStages& stages, const uint4* bands, const ScoreWalk<MT>& walk,
                                          ScoreCarry<MT>& carry, int lane) {
  constexpr int kStages = kScoreStages<Keys>;
  __syncwarp();  // the stages may still be read, from the walk before
  KeyWalk keys = key_walk(p, item, walk.first, walk.steps, walk.limit);
#pragma unroll 1
  for (int i = 0; i < kStages - 1; ++i) queue_stage<Keys>(p, item, keys, stages, i, lane);
  Tile<MT> c;
  int slot = 0, line = 0, first_key = walk.first;
#pragma unroll 1
  for (int i = 0; i < walk.steps * p.lines; ++i) {
    copy_async_wait<kStages - 2>();
    // Now this stage is here for all lanes, and none of them reads the one before, whose place is taken next.
    __syncwarp();
    queue_stage<Keys>(p, item, keys, stages, slot == 0 ? kStages - 1 : slot - 1, lane);
    if (line == 0) clear(c);
    multiply_line<Keys, MT>(p, queries, stages.lines + slot * kStageBytes, line, lane, c);
    const uint32_t present = stages.present[slot];
    slot = slot + 1 == kStages ? 0 : slot + 1;
    if (++line < p.lines) continue;
    line = 0;

    scale_logits(walk.factor, p.softcap, c);
    const bool whole = seen_whole(item, first_key, present);
    if (walk.pass == ScorePass::kSum) {
      if (!whole) hide_unseen<MT>(p, item, first_key, present, -INFINITY, lane, c);
      LaneSums<MT> sums = carry.sums();
      sums.add(c);
      carry.keep(sums);
    } else {
      take_weights(walk.norms, c);
      if (!whole) hide_unseen<MT>(p, item, first_key, present, 0.0f, lane, c);
      if (walk.pass == ScorePass::kPool) {
        pool_step(p, item, walk, bands, first_key, c, carry, lane);
      } else {
        pool_step_wide(p, walk, first_key, c, carry, lane);
      }
    }
    first_key += kStepKeys;
  }
}

}  // namespace specprefill
