// What the score kernel is told, and how its work is cut into numbered jobs. Host and device read it alike.
#pragma once

#include "common/device.cuh"

namespace specprefill {

// ---- sizes that the kernel is built around ----

constexpr int kScoreWarps = 4;  // of a block; each walks through keys of its own, so more would gain nothing
constexpr int kScoreThreads = kScoreWarps * kWarp;
// Keys that a warp multiplies at a time: four columns blocks of eight, so that a fragment of the queries that was read
// from shared memory serves four products.
constexpr int kStepKeys = 32;
// Bytes of a key's row that are staged at a time: a full 128-byte line. 32 keys of it are 4 KiB a stage and warp.
constexpr int kLineBytes = 128;
constexpr int kStageBytes = kStepKeys * kLineBytes;
// Steps of a warp in a job. Short, as all blocks together should have no more keys in flight than the second-level
// cache holds between the two passes (132 processors x 8 warps x 32 KiB at D = 128 are 34 MiB), yet long enough for the
// queries that a job loads first to be a few percent of it.
constexpr int kSumSteps = 4;
constexpr int kSumKeys = kScoreWarps * kSumSteps * kStepKeys;  // of a job: one partial sum
// Pooling needs neighbours: a warp's first and last eight keys belong to the positions of others too.
constexpr int kPoolSteps = 8;
constexpr int kHalo = 8;
constexpr int kWarpPositions = kPoolSteps * kStepKeys - 2 * kHalo;
constexpr int kPoolPositions = kScoreWarps * kWarpPositions;  // of a job

// Layers of one launch: their addresses travel with it, and a launch takes 4 KiB of arguments.
constexpr int kLayersPerLaunch = 64;
constexpr int kMaxPositions = 1 << 30;  // with room for sums of positions in 32 bits

struct ScoreLayer {
  const void* query;
  const void* key;
  const float* key_scale;  // nullptr: 1
  const float* lse;        // nullptr: computed
  float scale;
  int32_t window;  // kMaxPositions: none
};

// Look-ahead rows of the query heads that share a KV head, in groups of eight ("octets"), as a tensor core takes them:
// 8 / row_span heads x row_span rows each. row_span: the rows, up to the next power of two, at most 8.
struct ScoreRows {
  int32_t span_bits;      // log2(row_span)
  int32_t octets_across;  // octets that hold all heads at the same rows
  int32_t octets;         // of a KV head
  int32_t blocks;         // jobs that share them: 2 MT octets each
};

struct ScoreParams {
  float* state;
  int64_t state_stride_batch, state_stride_row;
  const int32_t *seq_lens, *cu_seqlens, *block_table, *num_look_ahead;
  int64_t block_table_stride;
  int64_t key_stride_row, key_stride_head, key_stride_token, key_stride_dim;  // bytes
  int64_t query_stride_batch, query_stride_row, query_stride_head, query_stride_dim;
  int64_t lse_stride_batch, lse_stride_row, lse_stride_head;
  int64_t key_scale_stride;
  int64_t num_blocks;  // paged: blocks in the cache
  int64_t room;        // tokens that a sequence's keys may take; packed: all tokens of the buffer
  int32_t block_size;  // paged, else 0
  int32_t state_rows, batch, look_ahead, max_len;
  int32_t group, kv_heads, head_dim, num_layers;
  int32_t query_dtype;
  int32_t query_parts;      // bf16 numbers that a query element is the sum of
  int32_t query_fragments;  // per part and 16 rows
  int32_t key_row_bytes;    // head_dim elements
  int32_t lines, chunks;    // of a key's row, of kLineBytes and of half as many
  int32_t half;             // of the pooling window
  float pool_part;          // 1 / pool_kernel_size; 0: 1 / the positions inside the prompt
  float softcap;            // 0: none
  bool query_is_ready;      // 8-byte reads get four numbers of the type that is multiplied
  bool key_e5m2;            // of fp8 keys: else e4m3
  bool key_is_aligned;      // 16-byte copies may read it
  bool observation;         // rows are the prompt's last ones; else they follow it
  bool counts_look_ahead;   // the softmax counts keys behind the prompt too
  ScoreRows rows;

  // Work and scratch memory.
  int32_t items;     // layer x sequence x KV head x block of rows
  int32_t sum_jobs;  // of an item at most; 0: lse is given
  int32_t pool_jobs;
  int32_t lead;  // sum jobs of later items that come before an item's pool jobs
  uint32_t* next_ticket;
  uint32_t *sums_done, *norm_ready;  // [items]
  float* norms;                      // [items, rows of a job] log2 of each row's sum of exponentials
  float2* partials;                  // [items, sum_jobs, rows of a job] maximum, and sum of exponentials beside it

  ScoreLayer layers[kLayersPerLaunch];
};

// ---- jobs ----
//
// Both passes are in one launch. Sum jobs (first pass) come in the order of their items; the pool jobs (second pass) of
// an item follow `lead` sum jobs behind its own last one, half as many as run at a time: so that they seldom wait, and
// soon enough to find its keys in the second-level cache, the last ones first. Neither has been measured yet.

struct ScoreJobs {
  uint32_t sums, pools;  // of an item
  uint32_t first;        // sum jobs before the first pool job
  uint32_t tickets;      // in all
};

__host__ __device__ __forceinline__ ScoreJobs score_jobs(const ScoreParams& p, uint32_t sums, uint32_t pools) {
  const uint32_t all = sums * p.items, some = sums == 0 ? 0 : sums + p.lead, first = all < some ? all : some;
  return {sums, pools, first, first + p.items * (sums + pools)};
}

struct ScoreJob {
  bool pool;     // which pass
  int32_t item;  // -1: nothing to do
  int32_t index;
};

__device__ __forceinline__ ScoreJob score_job(const ScoreParams& p, const ScoreJobs& jobs, uint32_t ticket) {
  uint32_t sum = ticket;
  if (ticket >= jobs.first) {
    const uint32_t period = jobs.sums + jobs.pools, item = (ticket - jobs.first) / period;
    const uint32_t index = (ticket - jobs.first) % period;
    if (index < jobs.pools) return {true, static_cast<int32_t>(item), static_cast<int32_t>(jobs.pools - 1 - index)};
    sum = jobs.first + item * jobs.sums + (index - jobs.pools);
  }
  const uint32_t item = sum / jobs.sums;
  if (item >= static_cast<uint32_t>(p.items)) return {false, -1, 0};
  return {false, static_cast<int32_t>(item), static_cast<int32_t>(sum % jobs.sums)};
}

}  // namespace specprefill
