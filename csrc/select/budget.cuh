// How many chunks a budget is worth, on the device, as lengths are only known there.
#pragma once

#include "select/check.h"
#include "select/params.cuh"

namespace specprefill {

// (units_per_chunk * chunks + rounding) / kRatioUnits, at most `chunks`: the integers of ops/select/budget.py. The
// product has up to 71 bits, so the halves of `chunks` are multiplied apart; none of these products passes 2^57.
__device__ __forceinline__ int ratio_budget(int chunks, int64_t units_per_chunk, int64_t rounding) {
  const int64_t high = chunks >> 16, low = chunks & 0xffff;
  const int64_t product = high * units_per_chunk;
  const int64_t rest = ((product % kRatioUnits) << 16) + low * units_per_chunk + rounding;
  const int64_t wanted = ((product / kRatioUnits) << 16) + rest / kRatioUnits;
  return static_cast<int>(min(wanted, static_cast<int64_t>(chunks)));
}

// Chunks to keep of `chunks`, by ratio or by tokens; 0 of none.
__device__ __forceinline__ unsigned chunk_budget(const SelectParams& p, int chunks) {
  const int wanted = p.by_ratio ? ratio_budget(chunks, p.units_per_chunk, p.units_rounding) : p.budget;
  return static_cast<unsigned>(min(max(wanted, 1), chunks));
}

}  // namespace specprefill
