// The score kernel: attention of look-ahead rows over the prompt, pooled, its maximum folded into the state.
//
// Bytes that must move: every key once, 2 D bytes a token and KV head in bf16, and per layer and sequence the state
// (4 N bytes a token, mostly only read, out of the second-level cache). Without `lse` the keys are read twice, as a
// weight needs the sum over all keys; the second time they come out of the second-level cache as far as it holds an
// item (one KV head of one layer and sequence: 16 MiB at 64K tokens, D = 128) and the sum jobs ahead of it. The floor
// at the rate of a copy: D * 2 * Hkv * T * L bytes, 2.9 ms at 3 TB/s for 32 layers of 8 KV heads at D = 128 and 128K
// tokens. Arithmetic a key and 16 rows: D / 16 / 8 products of tensor cores and 16 exponentials a pass, and in the
// second one half a product for the pooling. For 32 rows and D = 128 the second pass has some 1,000 instructions a warp
// for 32 keys (estimated from the binary for sm_90), about half of what a processor of an H100 issues while its share
// of memory's rate brings these keys; the first has half as many.
//
// Launches: one (and a memset of the counters) for up to 64 layers that differ in their addresses only; see params.cuh
// for how jobs follow each other. Warps share a block's queries, and otherwise walk alone, each through stages of its
// own, with no barrier but the warp's.
#pragma once

#include "common/jobs.cuh"
#include "score/walk.cuh"

namespace specprefill {

// What a block does next. It lies in shared memory: values that all threads use now and then, in nobody's registers.
struct ScoreWork {
  ScoreJobs jobs;
  ScoreItem item;
  ScoreJob job;
  bool any;       // else all is done
  uint32_t slot;  // see jobs.cuh
};

// How a block's shared memory is laid out, in bytes from its start.
template <class Keys, int MT>
struct ScoreLayout {
  static constexpr size_t kPresent = (sizeof(ScoreWork) + 15) / 16 * 16;  // [warps][stages], see KeyStages
  static constexpr size_t kBands = kPresent + kScoreWarps * kScoreStages<Keys> * sizeof(uint32_t);  // see pool_step
  static constexpr size_t kSums = kBands + 2 * kWarp * sizeof(uint4);                               // [warps][rows]
  static constexpr size_t kQueries = kSums + kScoreWarps * 16 * MT * sizeof(float2);                // see load_queries
  static_assert(kBands % 16 == 0 && kQueries % 16 == 0, "bands and queries are read 16 bytes at a time");

  // The stages' lines follow the queries.
  __host__ __device__ static size_t lines(int query_parts, int query_fragments) {
    return kQueries + static_cast<size_t>(query_parts) * MT * query_fragments * kWarp * sizeof(uint4);
  }
  static size_t bytes(int query_parts, int query_fragments) {
    return lines(query_parts, query_fragments) + size_t{kScoreWarps} * kScoreStages<Keys> * kStageBytes;
  }
};

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <int MT>
__device__ __forceinline__ void load_norms(const ScoreParams& p, const ScoreItem& item, int32_t index, int lane,
                                           float (&norms)[MT][2]) {
  const ScoreLayer& layer = p.layers[item.layer];
  OctetCursor octet = item.first;
#pragma unroll
  for (int m = 0; m < MT; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const ScoreRow row = row_of(p, item, octet, lane / 4);
      octet.advance(p);
      float norm = 0.0f;
      if (row.valid && layer.lse) {
        norm = kLog2E * layer.lse[item.b * p.lse_stride_batch + row.n * p.lse_stride_row +
                                  (static_cast<int64_t>(item.head) * p.group + row.head) * p.lse_stride_head];
        if (norm == INFINITY) norm = __int_as_float(0x7fffffff);  // no sum is infinite: not weights of 0, but NaN
      } else if (row.valid) {
        norm = load_relaxed(p.norms + static_cast<int64_t>(index) * 16 * MT + m * 16 + h * 8 + lane / 4);
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

// Counts the jobs of an item by the longest sequence that there is, which may be far shorter than the state: a CUDA
// graph is captured for the longest that may come. One warp does it; all blocks find the same.
__device__ __forceinline__ void count_jobs(const ScoreParams& p, ScoreJobs* jobs, int lane) {
  int readable = 0, length = 0;
  for (int b = lane; b < p.batch; b += kWarp) {
    const ScoreSequence sequence = sequence_of(p, b);
    if (sequence.rows == 0) continue;
    readable = max(readable, sequence.readable);
    length = max(length, sequence.length);
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    readable = max(readable, __shfl_xor_sync(kAllLanes, readable, step));
    length = max(length, __shfl_xor_sync(kAllLanes, length, step));
  }
  if (lane == 0) *jobs = score_jobs(p, p.sum_jobs ? ceil_div(readable, kSumKeys) : 0, ceil_div(length, kPoolPositions));
}

// Draws tickets until there is work. One thread does it.
template <int MT>
__device__ __forceinline__ void draw_work(const ScoreParams& p, ScoreWork* work) {
  for (;;) {
    const uint32_t ticket = atomicAdd(p.next_ticket, 1u);
    work->any = ticket < work->jobs.tickets;
    if (!work->any) return;
    const ScoreJob job = score_job(p, work->jobs, ticket);
    if (job.item < 0) continue;
    const ScoreItem item = item_of<MT>(p, job.item);
    const int first = job.index * (job.pool ? kPoolPositions : kSumKeys);
    if (item.rows == 0 || first >= (job.pool ? item.length : item.readable)) continue;
    work->job = job;
    work->item = item;
    return;
  }
}

// The warp's part of a job: positions (pool) or keys (sum) that are its own.
template <int MT>
__device__ __forceinline__ ScoreWalk<MT> walk_of(const ScoreParams& p, const ScoreWork& work, int warp, int lane) {
  ScoreWalk<MT> walk;
  walk.factor = logit_factor(p, work.item);
  if (work.job.pool) {
    walk.pass = p.half <= kHalo ? ScorePass::kPool : ScorePass::kPoolWide;
    walk.limit = work.item.length;
    walk.from = work.job.index * kPoolPositions + warp * kWarpPositions;
    walk.to = min(walk.from + kWarpPositions, work.item.length);
    load_norms<MT>(p, work.item, work.job.item, lane, walk.norms);
  } else {
    walk.pass = ScorePass::kSum;
    walk.limit = work.item.readable;
    walk.from = work.job.index * kSumKeys + warp * kSumSteps * kStepKeys;
    walk.to = min(walk.from + kSumSteps * kStepKeys, work.item.readable);
#pragma unroll
    for (int m = 0; m < MT; ++m) walk.norms[m][0] = walk.norms[m][1] = 0.0f;
  }
  return walk;
}

// The steps that give positions [from, to). They begin where the work was cut, whatever the length and the window: only
// whole steps are left out.
template <int MT>
__device__ __forceinline__ void set_steps(const ScoreParams& p, const ScoreItem& item, ScoreWalk<MT>& walk) {
  int last = walk.to;
  walk.first = walk.from;
  if (walk.pass == ScorePass::kPool) {
    walk.first -= kHalo;
    last += kHalo;
  } else if (walk.pass == ScorePass::kPoolWide) {
    walk.first = max(walk.from - p.half, 0);
    last = walk.to + min(p.half, item.length - walk.to);
  }
  const int skipped = max(first_seen(item) - walk.first, 0) / kStepKeys;
  walk.steps = max(ceil_div(last - walk.first, kStepKeys) - skipped, 0);
  walk.first += skipped * kStepKeys;
}

template <class Keys, int MT>
__global__ void __launch_bounds__(kScoreThreads, MT == 4 ? 2 : 3) score_kernel(const __grid_constant__ ScoreParams p) {
  using Layout = ScoreLayout<Keys, MT>;
  constexpr int kStages = kScoreStages<Keys>, kRows = 16 * MT;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  unsigned char* memory = shared_memory();
  auto* work = reinterpret_cast<ScoreWork*>(memory);
  auto* bands = reinterpret_cast<uint4*>(memory + Layout::kBands);
  auto* sums = reinterpret_cast<float2*>(memory + Layout::kSums);
  auto* queries = reinterpret_cast<uint4*>(memory + Layout::kQueries);
  KeyStages stages;
  stages.present = reinterpret_cast<uint32_t*>(memory + Layout::kPresent) + warp * kStages;
  stages.lines = memory + Layout::lines(p.query_parts, p.query_fragments) + warp * kStages * kStageBytes;

  if (warp < 2) {
    uint32_t band[2][2];
    for (int block = 0; block < 2; ++block) make_band(16 * (warp - 1), 8 * block - kHalo, p.half, lane, band[block]);
    bands[warp * kWarp + lane] = make_uint4(band[0][0], band[0][1], band[1][0], band[1][1]);
  } else if (warp == 2) {
    count_jobs(p, &work->jobs, lane);
  }

  for (;;) {
    __syncthreads();  // nobody needs the last job's shared memory any more
    if (threadIdx.x == 0) draw_work<MT>(p, work);
    __syncthreads();
    if (!work->any) return;
    const ScoreItem& item = work->item;
    load_queries<Keys, MT>(p, item, queries, warp, lane);
    if (work->job.pool && p.sum_jobs) wait_for_flag(p.norm_ready + work->job.item);
    __syncthreads();

    ScoreWalk<MT> walk = walk_of<MT>(p, *work, warp, lane);
    ScoreCarry<MT> carry;
    carry.clear();
    const int end = walk.to;
    if (walk.pass == ScorePass::kSum) carry.keep(LaneSums<MT>::none());
    while (walk.from < end) {
      if (walk.pass == ScorePass::kPoolWide) walk.to = min(walk.from + 16, end);
      set_steps(p, item, walk);
      walk_keys<Keys, MT>(p, item, queries, stages, bands, walk, carry, lane);
      if (walk.pass != ScorePass::kPoolWide) break;
      float positions[2][MT][4];
      carry.positions(0, positions[0]);
      carry.positions(1, positions[1]);
      fold<MT>(p, item, positions, walk.from, walk.from, walk.to, lane);
      carry.clear();
      walk.from += 16;
    }
    if (walk.pass == ScorePass::kSum) {
      carry.sums().write(sums + warp * kRows, lane);
      finish_sums<MT>(p, item, work->job, sums, &work->slot, warp, lane);
    }
  }
}

}  // namespace specprefill
