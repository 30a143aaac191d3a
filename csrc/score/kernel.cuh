// The score kernel: attention of look-ahead rows over the prompt, pooled, its maximum folded into the state.
//
// Bytes that must move: every key once, 2 D bytes a token and KV head in bf16, and per layer and sequence the state
// (4 N bytes a token, mostly only read, out of the second-level cache). Without `lse` the keys are read twice, as a
// weight needs the sum over all keys; the second time they come out of the second-level cache as far as it holds an
// item (one KV head of one layer and sequence: 16 MiB at 64K tokens, D = 128) and the sum jobs ahead of it. The floor
// at the rate of a copy: D * 2 * Hkv * T * L bytes, 2.9 ms at 3 TB/s for 32 layers of 8 KV heads at D = 128 and 128K
// tokens. Arithmetic a key and 16 rows: D / 16 * 2 / 8 products of tensor cores, 16 exponentials a pass, and in the
// second 8 / 8 products for the pooling: for 32 rows and D = 128 about a third of what an H100 can issue while it waits
// for the key.
//
// Launches: one (and a memset of the counters) for up to 64 layers that differ in their addresses only; see params.cuh
// for how jobs follow each other. Warps share a block's queries, and otherwise walk alone, each through stages of its
// own, with no barrier but the warp's.
#pragma once

#include "common/jobs.cuh"
#include "score/pool.cuh"
#include "score/sums.cuh"

namespace specprefill {

enum class ScorePass { kSum, kPool, kPoolWide };

// Stages of a warp: with one, its copies would not run beside its arithmetic. Keys that are sums of parts cost so much
// arithmetic that two are enough.
template <class Keys>
constexpr int kScoreStages = Keys::kParts == 1 ? 4 : 2;

// A block's shared memory.
template <class Keys, int MT>
struct ScoreShared {
  uint32_t slot;
  float2* sums;    // [warps][rows]
  uint4* queries;  // see load_queries
  KeyStages stages;

  static size_t bytes(int query_parts, int query_fragments) {
    return kHeader + static_cast<size_t>(query_parts) * MT * query_fragments * kWarp * sizeof(uint4) +
           static_cast<size_t>(kScoreWarps) * kScoreStages<Keys> * kStageBytes;
  }
  static constexpr size_t kSums = 16 + kScoreWarps * kScoreStages<Keys> * sizeof(uint32_t);  // where they begin
  static constexpr size_t kHeader = kSums + kScoreWarps * 16 * MT * sizeof(float2);
  static_assert(kSums % 16 == 0 && kHeader % 16 == 0, "queries are read 16 bytes at a time");
};

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
  uint32_t band[2][2][2];  // [keys before, these][block of 8 positions]
};

// What a step's weights add to 16 positions that lie between it and the one before.
template <int MT>
__device__ __forceinline__ void pool_step(const ScoreParams& p, const ScoreItem& item, const ScoreWalk<MT>& walk,
                                          int first_key, const Tile<MT>& c, ScoreCarry<MT>& carry, int lane) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int key = first_key + 16 * half, first = key - kHalo;
    Weights now[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) now[m].take(c, 2 * half, m);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      if (first + 8 * block + 8 <= walk.from || first + 8 * block >= walk.to) continue;
      float sums[MT][4] = {};
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        carry.weights(m).add_to(sums[m], walk.band[0][block]);
        now[m].add_to(sums[m], walk.band[1][block]);
      }
      fold<MT>(p, item, sums, first + 8 * block, walk.from, walk.to, lane);
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
                                          const KeyStages& stages, const ScoreWalk<MT>& walk, ScoreCarry<MT>& carry,
                                          int lane) {
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
    queue_stage<Keys>(p, item, keys, stages, (slot + kStages - 1) % kStages, lane);
    if (line == 0) clear(c);
    multiply_line<Keys, MT>(p, queries, stages.lines + slot * kStageBytes, line, lane, c);
    const uint32_t present = stages.present[slot];
    slot = (slot + 1) % kStages;
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
        pool_step(p, item, walk, first_key, c, carry, lane);
      } else {
        pool_step_wide(p, walk, first_key, c, carry, lane);
      }
    }
    first_key += kStepKeys;
  }
}

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <int MT>
__device__ __forceinline__ void load_norms(const ScoreParams& p, const ScoreItem& item, int32_t index, int lane,
                                           float (&norms)[MT][2]) {
  const ScoreLayer& layer = p.layers[item.layer];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const ScoreRow row = row_of(p, item, item.first_octet + 2 * m + h, lane / 4);
      float norm = 0.0f;
      if (row.valid && layer.lse) {
        norm = kLog2E * layer.lse[item.b * p.lse_stride_batch + row.n * p.lse_stride_row +
                                  (static_cast<int64_t>(item.head) * p.group + row.head) * p.lse_stride_head];
      } else if (row.valid) {
        norm = __ldcg(p.norms + static_cast<int64_t>(index) * 16 * MT + m * 16 + h * 8 + lane / 4);
      }
      norms[m][h] = norm;
    }
  }
}

// Writes a sum job's result, and behind the last one of an item the rows' norms.
template <int MT>
__device__ __forceinline__ void finish_sums(const ScoreParams& p, const ScoreItem& item, const ScoreJob& job,
                                            const float2* sums, uint32_t* slot, int warp, int lane) {
  constexpr int kRows = 16 * MT;
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x);
  if (row < kRows) {
    float2 sum = sums[row];
#pragma unroll
    for (int w = 1; w < kScoreWarps; ++w) sum = join_sums(sum, sums[w * kRows + row]);
    p.partials[(static_cast<int64_t>(job.item) * p.sum_jobs + job.index) * kRows + row] = sum;
  }
  const int count = ceil_div(item.readable, kSumKeys);
  if (finished_last(p.sums_done + job.item, static_cast<uint32_t>(count), slot)) {
    write_norms<MT>(p, job.item, count, warp, lane);
    raise_flag(p.norm_ready + job.item);
  }
}

template <class Keys, int MT>
__global__ void __launch_bounds__(kScoreThreads, MT == 4 ? 2 : 3) score_kernel(const __grid_constant__ ScoreParams p) {
  using Shared = ScoreShared<Keys, MT>;
  constexpr int kStages = kScoreStages<Keys>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned char* memory = shared_memory();
  auto* slot = reinterpret_cast<uint32_t*>(memory);
  auto* sums = reinterpret_cast<float2*>(memory + Shared::kSums);
  auto* queries = reinterpret_cast<uint4*>(memory + Shared::kHeader);
  KeyStages stages;
  stages.present = slot + 4 + warp * kStages;
  stages.lines = memory + Shared::kHeader +
                 static_cast<size_t>(p.query_parts) * MT * p.query_fragments * kWarp * sizeof(uint4) +
                 warp * kStages * kStageBytes;

  for (;;) {
    const uint32_t ticket = next_ticket(p.next_ticket, slot);
    if (ticket >= p.tickets) return;
    const ScoreJob job = score_job(p, ticket);
    if (job.item < 0) continue;
    const ScoreItem item = item_of<MT>(p, job.item);
    if (item.rows == 0 ||
        job.index * (job.pool ? kPoolPositions : kSumKeys) >= (job.pool ? item.length : item.readable))
      continue;

    load_queries<Keys, MT>(p, item, queries);
    if (job.pool && p.sum_jobs) wait_for_flag(p.norm_ready + job.item);
    __syncthreads();

    ScoreWalk<MT> walk;
    walk.factor = logit_factor(p, item);
    ScoreCarry<MT> carry;
    if (job.pool) {
      walk.pass = p.half <= kHalo ? ScorePass::kPool : ScorePass::kPoolWide;
      walk.limit = item.length;
      walk.from = job.index * kPoolPositions + warp * kWarpPositions;
      walk.to = min(walk.from + kWarpPositions, item.length);
      load_norms<MT>(p, item, job.item, lane, walk.norms);
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        make_band(-16, 8 * block - kHalo, p.half, lane, walk.band[0][block]);
        make_band(0, 8 * block - kHalo, p.half, lane, walk.band[1][block]);
      }
    } else {
      walk.pass = ScorePass::kSum;
      walk.limit = item.readable;
      walk.from = job.index * kSumKeys + warp * kSumSteps * kStepKeys;
      walk.to = min(walk.from + kSumSteps * kStepKeys, item.readable);
    }
    const int end = walk.to;
    while (walk.from < end) {
      // Steps begin where the work was cut, whatever the length and the window: only whole steps are left out.
      int last = end;
      walk.first = walk.from;
      if (walk.pass == ScorePass::kPool) {
        walk.first -= kHalo;
        last += kHalo;
      } else if (walk.pass == ScorePass::kPoolWide) {
        walk.to = min(walk.from + 16, end);
        walk.first = max(walk.from - p.half, 0);
        last = min(walk.from + 16 + p.half, item.length);
      }
      const int skipped = max(first_seen(item) - walk.first, 0) / kStepKeys;
      walk.steps = max(ceil_div(last - walk.first, kStepKeys) - skipped, 0);
      walk.first += skipped * kStepKeys;
      carry.clear();
      if (walk.pass == ScorePass::kSum) {
        LaneSums<MT> none;
        none.clear();
        carry.keep(none);
      }
      walk_keys<Keys, MT>(p, item, queries, stages, walk, carry, lane);
      if (walk.pass != ScorePass::kPoolWide) break;
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        float positions[MT][4];
        carry.positions(block, positions);
        fold<MT>(p, item, positions, walk.from + 8 * block, walk.from, walk.to, lane);
      }
      walk.from += 16;
    }
    if (!job.pool) {
      // A warp without keys has nothing to add.
      LaneSums<MT> mine = carry.sums();
      if (walk.from >= end) mine.clear();
      mine.write(sums + warp * 16 * MT, lane);
      finish_sums<MT>(p, item, job, sums, slot, warp, lane);
    }
  }
}

}  // namespace specprefill
