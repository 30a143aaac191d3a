// What the portable part of finalize (tile.cpp) asks of the code built per instruction set (cpu_simd.cpp).
#pragma once

#include <stdint.h>

namespace specprefill {

struct FinalizeKernels {
  // out[i] = (x[i] + x[stride + i] + ... of `rows` rows, in their order) / divisor, or their maximum where `maximum`.
  // Whether all of x is finite. `out` may be a row of x.
  bool (*reduce)(const float* x, int64_t stride, int64_t rows, int64_t count, bool maximum, float divisor, float* out);

  // sums[i] = x[i] + ... + x[i + width - 1]. Destroys x; both have room for 16 elements more than they hold.
  void (*window_sums)(float* x, int64_t count, int64_t width, float* sums);
};

const FinalizeKernels& finalize_kernels();  // of this processor

namespace generic {
extern const FinalizeKernels finalize_kernels;
}
namespace avx2 {
extern const FinalizeKernels finalize_kernels;
}
namespace avx512 {
extern const FinalizeKernels finalize_kernels;
}

}  // namespace specprefill
