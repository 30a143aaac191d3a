// What the sources of the single kernels share; see kernels.h.
#pragma once

#include "score/kernel.cuh"
#include "score/kernels.h"

namespace specprefill {

template <class Keys, int MT>
ScoreKernel score_kernel_of(int parts, int chunks) {
  return {&score_kernel<Keys, MT>, MT, ScoreLayout<Keys, MT>::bytes(parts, chunks * (4 / Keys::kBytes))};
}

template <class Keys>
ScoreKernel score_kernel_for(int row_tiles, int parts, int chunks) {
  // 64 rows of keys in parts would want more registers than there are.
  if constexpr (Keys::kParts == 1) {
    if (row_tiles > 2) return score_kernel_of<Keys, 4>(parts, chunks);
  }
  if (row_tiles > 1) return score_kernel_of<Keys, 2>(parts, chunks);
  return score_kernel_of<Keys, 1>(parts, chunks);
}

}  // namespace specprefill
