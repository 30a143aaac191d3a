// CUDA C++ for a plain C++ compiler: kernels run on the CPU, one fiber per CUDA thread, so that tests need no GPU. Only
// csrc/common/device.cuh includes this.
//
// What it adds to a GPU: thread orders that may be chosen, shared memory that starts as NaN, copies that arrive as late
// as they may, and errors (through cudaGetLastError) for barriers that not all threads reach and waits that never end.
// README.md beside this file says what it finds and what it does not.
#pragma once

#include "emulation/language.h"
//
#include "emulation/arithmetic.h"
#include "emulation/atomics.h"
#include "emulation/memory.h"
#include "emulation/mma.h"
#include "emulation/runtime.h"
#include "emulation/sync.h"
#include "emulation/warp.h"
