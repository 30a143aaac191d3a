// Instructions that CUDA C++ has no name for: PTX on a GPU, the emulation's own version on the CPU.
#pragma once

#include "common/device.cuh"

namespace specprefill {

// ---- copies that run beside the arithmetic (PTX ISA: cp.async) ----

// Queues a copy of `bytes` (0 to 16) from global to shared memory; the rest of the 16 bytes becomes zero. Both
// addresses are multiples of 16; `from` must be valid even for no bytes.
__device__ __forceinline__ void copy_async_16(void* to_shared, const void* from, int bytes) {
#if defined(SPECPREFILL_EMULATED)
  emulation::copy_async_16(to_shared, from, bytes);
#else
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#endif
}

// Closes a group of the calling thread's queued copies.
__device__ __forceinline__ void copy_async_commit() {
#if defined(SPECPREFILL_EMULATED)
  emulation::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `kPending` of the calling thread's groups are still on their way. What they wrote is then visible
// to this thread; to others after a barrier.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
#if defined(SPECPREFILL_EMULATED)
  emulation::copy_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- tensor cores (PTX ISA: mma.sync.aligned.m16n8k16.row.col) ----
//
// Lane l has group g = l / 4 and thread t = l % 4. a: rows g (a[0], a[2]) and g + 8 (a[1], a[3]), columns 2t, 2t + 1
// (a[0], a[1]) and 2t + 8, 2t + 9 (a[2], a[3]). b: column g, rows 2t, 2t + 1 (b[0]) and 2t + 8, 2t + 9 (b[1]). c: rows
// g (c[0], c[1]) and g + 8 (c[2], c[3]), columns 2t and 2t + 1. The element of the lower index is in the lower half of
// a register.

// c += a * b, bf16 with fp32 sums.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(SPECPREFILL_EMULATED)
  emulation::mma_bf16(c, a, b0, b1);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// c += a * b, fp16 with fp32 sums.
__device__ __forceinline__ void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(SPECPREFILL_EMULATED)
  emulation::mma_f16(c, a, b0, b1);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- conversions ----

// Two fp32 as bf16, rounded to nearest even: `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
#if defined(SPECPREFILL_EMULATED)
  return emulation::pack_bf16(low, high);
#else
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// Two fp32 as fp16, rounded to nearest even: `low` in the lower half.
__device__ __forceinline__ uint32_t pack_f16(float low, float high) {
#if defined(SPECPREFILL_EMULATED)
  return emulation::pack_f16(low, high);
#else
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// fp16 in the lower half of `bits` as fp32.
__device__ __forceinline__ float f16_to_float(uint32_t bits) {
#if defined(SPECPREFILL_EMULATED)
  return emulation::f16_to_float(static_cast<uint16_t>(bits));
#else
  float x;
  asm("{.reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "h"(static_cast<uint16_t>(bits)));
  return x;
#endif
}

// Two fp8 (e4m3fn, or e5m2) in the lower 16 bits as fp16, exactly; the lower byte becomes the lower half.
__device__ __forceinline__ uint32_t f8_pair_to_f16(uint32_t pair, bool e5m2) {
#if !defined(SPECPREFILL_EMULATED) && __CUDA_ARCH__ >= 890
  uint32_t two;
  const auto bits = static_cast<uint16_t>(pair);
  if (e5m2) {
    asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(two) : "h"(bits));
  } else {
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(two) : "h"(bits));
  }
  return two;
#else
  const uint32_t wide = (pair & 0xffu) << 8 | (pair & 0xff00u) << 16;
  if (e5m2) return wide;  // the upper half of an fp16
  // The same bits mean a number 2^8 as large, with an exponent one bit shorter and NaN where the largest one would be.
  const auto scaled = [](uint32_t half) {
    const uint32_t magnitude = half & 0x7f00u;
    if (magnitude == 0x7f00u) return __uint_as_float(0x7fffffffu);
    return __fmul_rn(f16_to_float((half & 0x8000u) | magnitude >> 1), 256.0f);
  };
  return pack_f16(scaled(wide & 0xffffu), scaled(wide >> 16));
#endif
}

// ---- arithmetic ----

// 2^x, relative error 2^-22; 0 for -Inf.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(SPECPREFILL_EMULATED)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// 1 / x, relative error 2^-23; 0 for Inf.
__device__ __forceinline__ float reciprocal_fast(float x) {
#if defined(SPECPREFILL_EMULATED)
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The larger one; NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
#if defined(SPECPREFILL_EMULATED)
  return a != a || b != b ? __int_as_float(0x7fffffff) : fmaxf(a, b);
#else
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));
  return m;
#endif
}

// ---- memory that several blocks share ----

// A read of what other blocks change with atomic functions meanwhile: some value that it had.
__device__ __forceinline__ float load_relaxed(const float* p) {
#if defined(SPECPREFILL_EMULATED)
  return emulation::load_relaxed(p);
#else
  float x;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(x) : "l"(p) : "memory");
  return x;
#endif
}

__device__ __forceinline__ unsigned load_relaxed(const unsigned* p) {
#if defined(SPECPREFILL_EMULATED)
  return emulation::load_relaxed(p);
#else
  unsigned x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
#endif
}

// A read that sees everything written before the matching `store_release` of another block.
__device__ __forceinline__ unsigned load_acquire(const unsigned* p) {
#if defined(SPECPREFILL_EMULATED)
  return emulation::load_acquire(p);
#else
  unsigned x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
#endif
}

__device__ __forceinline__ void store_release(unsigned* p, unsigned x) {
#if defined(SPECPREFILL_EMULATED)
  emulation::store_release(p, x);
#else
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
#endif
}

}  // namespace specprefill
