// The state as the host hands it to kernels.
#pragma once

#include <algorithm>

#include "finalize/importance.cuh"
#include "specprefill.h"

namespace specprefill {

// For checked arguments. What they say only about memory that is not there is left out, so that it narrows no load.
inline ImportanceSource importance_source(const specprefill_finalize& args) {
  ImportanceSource s{};
  s.state = args.state;
  s.seq_lens = args.seq_lens;
  s.num_look_ahead = args.num_look_ahead;
  s.stride_batch = args.batch > 1 ? args.state_stride_batch : 0;
  s.stride_row = args.look_ahead > 1 ? args.state_stride_row : 0;
  s.stride_token = args.max_len > 1 ? args.state_stride_token : 1;
  s.look_ahead = static_cast<int>(args.look_ahead);
  s.max_len = static_cast<int>(args.max_len);
  s.half = static_cast<int>(std::min(args.pool_kernel_size / 2, args.max_len - 1));
  s.divisor = args.pool_edge == SPECPREFILL_POOL_VALID ? 0.0f : static_cast<float>(args.pool_kernel_size);
  s.mean = args.reduce == SPECPREFILL_MEAN;
  s.pooled = args.pool_kernel_size > 1;
  s.wide = s.stride_token == 1 && s.stride_batch % 4 == 0 && s.stride_row % 4 == 0 &&
           reinterpret_cast<uintptr_t>(args.state) % 16 == 0;
  return s;
}

}  // namespace specprefill
