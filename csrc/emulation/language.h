// Keywords, built-in types and variables of CUDA C++.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// Left out: __shared__ (a block's variables would need a place per block; kernels here use dynamic shared memory only)
// and
// __noinline__ (the C++ library uses that name for itself).

// ---- vector types, with the alignment that CUDA gives them ----

#define SPECPREFILL_VECTOR2(name, type, align) \
  struct __align__(align) name {               \
    type x, y;                                 \
  };                                           \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SPECPREFILL_VECTOR3(name, type) \
  struct name {                         \
    type x, y, z;                       \
  };                                    \
  inline name make_##name(type x, type y, type z) { return {x, y, z}; }
#define SPECPREFILL_VECTOR4(name, type, align) \
  struct __align__(align) name {               \
    type x, y, z, w;                           \
  };                                           \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }

SPECPREFILL_VECTOR2(char2, signed char, 2)
SPECPREFILL_VECTOR2(uchar2, unsigned char, 2)
SPECPREFILL_VECTOR2(short2, short, 4)
SPECPREFILL_VECTOR2(ushort2, unsigned short, 4)
SPECPREFILL_VECTOR2(int2, int, 8)
SPECPREFILL_VECTOR2(uint2, unsigned, 8)
SPECPREFILL_VECTOR2(longlong2, long long, 16)
SPECPREFILL_VECTOR2(ulonglong2, unsigned long long, 16)
SPECPREFILL_VECTOR2(float2, float, 8)
SPECPREFILL_VECTOR2(double2, double, 16)
SPECPREFILL_VECTOR3(int3, int)
SPECPREFILL_VECTOR3(uint3, unsigned)
SPECPREFILL_VECTOR3(float3, float)
SPECPREFILL_VECTOR4(char4, signed char, 4)
SPECPREFILL_VECTOR4(uchar4, unsigned char, 4)
SPECPREFILL_VECTOR4(short4, short, 8)
SPECPREFILL_VECTOR4(ushort4, unsigned short, 8)
SPECPREFILL_VECTOR4(int4, int, 16)
SPECPREFILL_VECTOR4(uint4, unsigned, 16)
SPECPREFILL_VECTOR4(float4, float, 16)

#undef SPECPREFILL_VECTOR2
#undef SPECPREFILL_VECTOR3
#undef SPECPREFILL_VECTOR4

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// ---- built-in variables ----

namespace emulation {

// Where a thread stands in its grid.
struct Place {
  uint3 thread, block;
  dim3 block_size, grid_size;
};

// Of the thread that is running. Not a plain thread_local: that costs a function call per use in a shared object.
extern __thread const Place* place __attribute__((tls_model("initial-exec")));

// Ends the launch: `format` says what the calling thread did wrong.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

}  // namespace emulation

#define threadIdx (::emulation::place->thread)
#define blockIdx (::emulation::place->block)
#define blockDim (::emulation::place->block_size)
#define gridDim (::emulation::place->grid_size)

constexpr int warpSize = 32;

[[noreturn]] inline void __trap() { emulation::fail("__trap()"); }
