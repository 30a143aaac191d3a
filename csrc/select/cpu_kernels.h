// What the portable part of selection (selector.cpp) asks of the code built per instruction set (cpu_simd.cpp).
#pragma once

#include <stdint.h>

namespace specprefill {

struct SelectKernels {
  // sums[c] = the sum of x[c * size ... (c + 1) * size) in fp64; its order depends on `size` alone.
  void (*chunk_sums)(const float* x, int64_t chunks, int64_t size, double* sums);
};

const SelectKernels& select_kernels();  // of this processor

namespace generic {
extern const SelectKernels select_kernels;
}
namespace avx2 {
extern const SelectKernels select_kernels;
}
namespace avx512 {
extern const SelectKernels select_kernels;
}

}  // namespace specprefill
