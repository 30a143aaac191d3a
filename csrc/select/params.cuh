// What the selection kernel is told, and the scratch memory through which its phases talk.
#pragma once

#include "finalize/importance.cuh"
#include "gather/tokens.cuh"

namespace specprefill {

constexpr int kSelectThreads = 512;
constexpr int kSelectWarps = kSelectThreads / kWarp;
constexpr int kSelectTokens = 4 * kSelectThreads;  // that a block looks at at a time: one 16-byte load a thread and row

struct SelectParams {
  ImportanceSource source;
  float* importance;  // [B, T] contiguous, written; null where it is the source
  const uint8_t* protect;
  int64_t protect_stride_batch, protect_stride_token;
  unsigned batch;
  int sink, tail;      // within T
  int chunk_size;      // within T: a larger chunk holds the whole prompt either way
  int num_chunks;      // of T tokens: C
  int chunks_per_job;  // of the first phase
  int lanes;           // threads that add one chunk, a power of 2
  unsigned jobs_per_sequence;
  bool by_ratio, by_mass;
  int64_t units_per_chunk, units_rounding;  // of a budget by ratio, see budget.cuh
  int budget;                               // chunks, of a budget by tokens
  double mass_fraction;                     // of a budget by mass
  int held_keys;                            // that shared memory has room for
  // Counters, zero at the start:
  unsigned* ticket;    // the next job of the first phase
  unsigned* ranked;    // sequences
  unsigned* ready;     // the flag: all are ranked
  unsigned* finished;  // [B] jobs of each sequence
  // Scratch:
  unsigned* keys;      // [B, C]
  double* masses;      // [B, C], by mass only
  int32_t* chunk_ids;  // [B, C] kept chunks, in order
  // Results:
  int32_t* indices;  // [B, width]
  int32_t* num_kept;
  uint8_t* overflow;
  unsigned width;
  unsigned expand_jobs_per_sequence;
  bool gathers;
  unsigned gather_tiles;
  TokensGather gather;  // where `gathers`
};

// Keys are unsigned integers in the order of the fp32 they stand for, and three that stand for none.
constexpr unsigned kAbsent = 0;            // below all numbers
constexpr unsigned kNan = 0xfffffffeu;     // above them, as in torch.topk
constexpr unsigned kForced = 0xffffffffu;  // kept whatever the budget

// What block-wide sums and scans pass between warps.
struct BlockScratch {
  double masses[kSelectWarps];
  unsigned counts[kSelectWarps];
};

struct RankScratch {
  // One column for each lane: the lanes of a warp never add to the same bank, however alike the keys are. Cleared 16
  // bytes at a time.
  alignas(16) unsigned histogram[256 * kWarp];
  unsigned above[kSelectWarps], ties[kSelectWarps];
  unsigned digit, left, in_digit;
};

struct SelectShared {
  unsigned slot;  // of jobs.cuh
  BlockScratch block;
  union {
    float tile[kSelectTokens];
    RankScratch rank;
    Row rows[kSelectThreads * kWordsPerThread];
  };
  // Behind it: keys of the sequence being ranked, `held_keys` of them.
  __device__ __forceinline__ unsigned* keys() { return reinterpret_cast<unsigned*>(this + 1); }
};

}  // namespace specprefill
