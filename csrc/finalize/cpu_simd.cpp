// Sums over rows and over windows, built once per instruction set.

#if defined(__GNUC__) && !defined(__clang__)  // as in score/cpu_simd.cpp
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "common/simd.h"
#include "finalize/cpu_kernels.h"

namespace specprefill {
namespace SPECPREFILL_ISA {

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

SPECPREFILL_INLINE vu larger(vu a, vu b) { return b > a ? b : a; }

// kVectors vectors from column i on: all rows of them before the next ones, so that each row is one stream of memory.
template <int kVectors>
SPECPREFILL_INLINE vu reduce_columns(const float* x, int64_t stride, int64_t rows, bool maximum, float divisor,
                                     float* out) {
  vf total[kVectors];
  vu magnitude{};
  for (int v = 0; v < kVectors; ++v) {
    total[v] = load(x + v * kLanes);
    magnitude = larger(magnitude, (vu)total[v] & kMagnitude);
  }
  for (int64_t n = 1; n < rows; ++n) {
    for (int v = 0; v < kVectors; ++v) {
      const vf here = load(x + n * stride + v * kLanes);
      magnitude = larger(magnitude, (vu)here & kMagnitude);
      total[v] = maximum ? max(total[v], here) : total[v] + here;
    }
  }
  for (int v = 0; v < kVectors; ++v) store(out + v * kLanes, total[v] / splat(divisor));
  return magnitude;
}

static bool reduce(const float* x, int64_t stride, int64_t rows, int64_t count, bool maximum, float divisor,
                   float* out) {
  vu magnitude{};  // neither NaN nor Inf: no magnitude has an exponent of ones
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    magnitude = larger(magnitude, reduce_columns<4>(x + i, stride, rows, maximum, divisor, out + i));
  }
  for (; i + kLanes <= count; i += kLanes) {
    magnitude = larger(magnitude, reduce_columns<1>(x + i, stride, rows, maximum, divisor, out + i));
  }
  uint32_t largest = 0;
  for (int k = 0; k < kLanes; ++k) largest = magnitude[k] > largest ? magnitude[k] : largest;
  for (; i < count; ++i) {  // the same operations, one by one
    float total = 0;
    for (int64_t n = 0; n < rows; ++n) {
      const float here = x[n * stride + i];
      uint32_t bits;
      memcpy(&bits, &here, sizeof bits);
      largest = (bits & kMagnitude) > largest ? bits & kMagnitude : largest;
      total = n == 0 ? here : maximum ? (here > total ? here : total) : total + here;
    }
    out[i] = total / divisor;
  }
  return largest < kInfinity;
}

// From sums over 1, 2, 4, ... neighbours: log2(width) additions per element, in an order that does not depend on where
// the tile begins.
static void window_sums(float* x, int64_t count, int64_t width, float* sums) {
  int64_t offset = 0, have = count + width - 1;
  for (int64_t power = 1; power <= width; power *= 2) {
    if (width & power) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const vf part = load(x + offset + i);
        store(sums + i, offset == 0 ? part : load(sums + i) + part);
      }
      offset += power;
    }
    if (power * 2 <= width) {
      have -= power;
      for (int64_t i = 0; i < have; i += kLanes) store(x + i, load(x + i) + load(x + i + power));
    }
  }
}

extern const FinalizeKernels finalize_kernels;
const FinalizeKernels finalize_kernels = {reduce, window_sums};

}  // namespace SPECPREFILL_ISA
}  // namespace specprefill
