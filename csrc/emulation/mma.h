// Tensor cores and 16-bit floats.
#pragma once

#include "emulation/language.h"

namespace emulation {

// c += a * b of one warp, all 32 lanes; the layout of the fragments is in csrc/common/ptx.cuh.
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// Two fp32 rounded to nearest even, `low` in the lower half.
uint32_t pack_bf16(float low, float high);
uint32_t pack_f16(float low, float high);

float f16_to_float(uint16_t bits);

}  // namespace emulation
