// The second half of the score's arithmetic, for the table in cpu_simd.cpp: see cpu_kernels.h.
#pragma once

#include "score/cpu_kernels.h"

namespace specprefill {
namespace SPECPREFILL_ISA {

void pool_max(const PoolRows& rows, float* best, int64_t stride);
void fold(const StateRows& rows, float* best);

}  // namespace SPECPREFILL_ISA
}  // namespace specprefill
