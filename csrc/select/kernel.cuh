// Selection: importance, or the state it is made from, to kept positions and packed tokens, in one launch.
//
// Bytes that must move, for a sequence of T tokens: 4T of importance in (with the state 4 * rows * T, and 4T out), T
// with `protect`; out 4K indices, with a gather 8K position ids and K tokens in and out. Keys (4 bytes a chunk) and
// chunk ids stay in the second-level cache. 128K tokens are 0.6 MB, 0.2 us at 3.35 TB/s, from 8 rows of state 1.7 us:
// not the bytes count but the steps that wait for each other, one launch, five trips to memory and one block that ranks
// 4096 chunks. So there is one launch for all phases:
//
// 1. keys. Blocks draw tickets for tiles of 2048 tokens and turn them into one ordered key per chunk.
// 2. rank. The block that finishes a sequence's last tile ranks the sequence. Tickets go from sequence to sequence, so
//    that of many short ones most are ranked while others are still read. The block that ranks the last sequence adds
//    up the offsets and raises a flag.
// 3. expand and gather. All other blocks wait at that flag, then share what is to be written.
//
// A wait always ends: whoever finds no ticket of the first phase left knows that their holders run. The grid is what
// the device runs at a time, or what there is to do if that is less; nothing depends on lengths, which only the device
// knows, nor on how many blocks there are.
//
// Sums are fp64, in an order that follows from the chunk size alone: a batch equals its sequences alone, bit for bit.
#pragma once

#include "common/jobs.cuh"
#include "select/expand.cuh"
#include "select/keys.cuh"
#include "select/rank.cuh"

namespace specprefill {

__global__ void __launch_bounds__(kSelectThreads, 1) select_kernel(const __grid_constant__ SelectParams p) {
  auto& shared = *reinterpret_cast<SelectShared*>(shared_memory());
  const unsigned key_jobs = p.batch * p.jobs_per_sequence;
  for (;;) {
    const unsigned job = next_ticket(p.ticket, &shared.slot);
    if (job >= key_jobs) break;
    const unsigned b = job / p.jobs_per_sequence;
    const auto first = static_cast<int>(job % p.jobs_per_sequence) * p.chunks_per_job;
    make_keys(p, sequence_of(p, b), first, min(p.num_chunks - first, p.chunks_per_job), shared);
    if (!finished_last(&p.finished[b], p.jobs_per_sequence, &shared.slot)) continue;
    rank_sequence(p, b, shared);
    if (p.batch > 1 && !finished_last(p.ranked, p.batch, &shared.slot)) continue;
    if (p.gathers) write_offsets(p, shared.block);
    raise_flag(p.ready);
  }
  wait_for_flag(p.ready);
  const unsigned expand_jobs = p.batch * p.expand_jobs_per_sequence;
  for (unsigned job = blockIdx.x; job < expand_jobs; job += gridDim.x) expand(p, job);
  for (unsigned tile = blockIdx.x; tile < p.gather_tiles; tile += gridDim.x) gather(p, tile, shared);
}

}  // namespace specprefill
