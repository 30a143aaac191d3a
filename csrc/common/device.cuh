// What every CUDA source includes instead of the toolkit's headers: with SPECPREFILL_EMULATED a plain C++ compiler sees
// the same names from csrc/emulation, which runs kernels on the CPU to test them.
#pragma once

#include <cstdint>

#if defined(SPECPREFILL_EMULATED)
#include "emulation/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace specprefill {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The block's dynamic shared memory, 16-byte aligned: the only shared memory that kernels here use.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(SPECPREFILL_EMULATED)
  return emulation::shared_memory();
#else
  extern __shared__ __align__(16) unsigned char specprefill_shared[];
  return specprefill_shared;
#endif
}

}  // namespace specprefill
