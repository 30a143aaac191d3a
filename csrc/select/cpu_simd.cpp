// Sums of chunks, built once per instruction set.

#include <string.h>

#include "select/cpu_kernels.h"

namespace specprefill {
namespace SPECPREFILL_ISA {

constexpr int kEight = 8;
typedef float f8 __attribute__((vector_size(kEight * 4)));
typedef double d8 __attribute__((vector_size(kEight * 8)));

static inline void add(d8& sum, const float* p) {
  f8 x;
  memcpy(&x, p, sizeof x);
  sum += __builtin_convertvector(x, d8);
}

static void chunk_sums(const float* x, int64_t chunks, int64_t size, double* sums) {
  for (int64_t c = 0; c < chunks; ++c, x += size) {
    d8 part[2] = {};
    int64_t i = 0;
    for (; i + 2 * kEight <= size; i += 2 * kEight) {
      add(part[0], x + i);
      add(part[1], x + i + kEight);
    }
    if (i + kEight <= size) add(part[0], x + i), i += kEight;
    const d8 eight = part[0] + part[1];
    double sum = ((eight[0] + eight[4]) + (eight[2] + eight[6])) + ((eight[1] + eight[5]) + (eight[3] + eight[7]));
    for (; i < size; ++i) sum += (double)x[i];
    sums[c] = sum;
  }
}

extern const SelectKernels select_kernels;
const SelectKernels select_kernels = {chunk_sums};

}  // namespace SPECPREFILL_ISA
}  // namespace specprefill
