// The score kernels that are compiled, each in a source file of its own so that they compile side by side.
#pragma once

#include <cstddef>

namespace specprefill {

struct ScoreParams;
struct KeysBf16;
struct KeysF16;
template <bool kHalf>
struct KeysF8;
struct KeysSplitF16;
struct KeysF32;

struct ScoreKernel {
  void (*run)(ScoreParams);
  int row_tiles;  // 16 rows each, that a job has
  size_t shared_bytes;
};

// The kernel for these keys and at most `row_tiles` (at least 1) 16 rows a job, whose queries have `parts` parts of
// `chunks` times 64 bytes of a key's row.
template <class Keys>
ScoreKernel score_kernel_for(int row_tiles, int parts, int chunks);

extern template ScoreKernel score_kernel_for<KeysBf16>(int, int, int);
extern template ScoreKernel score_kernel_for<KeysF16>(int, int, int);
extern template ScoreKernel score_kernel_for<KeysF8<false>>(int, int, int);
extern template ScoreKernel score_kernel_for<KeysF8<true>>(int, int, int);
extern template ScoreKernel score_kernel_for<KeysSplitF16>(int, int, int);
extern template ScoreKernel score_kernel_for<KeysF32>(int, int, int);

}  // namespace specprefill
