// Vectors of fp32 for the instruction set that this file is compiled for, and loads that convert to them.
//
// Only files built once per instruction set (*_simd.cpp) include this. Everything is in a namespace of that
// instruction set and nothing comes from the standard library: were an inline function shared with portable code, the
// linker could keep the copy with instructions that the processor lacks.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "specprefill.h"

#define SPECPREFILL_INLINE static inline __attribute__((always_inline))
#define SPECPREFILL_INLINE_MEMBER inline __attribute__((always_inline))

namespace specprefill {
namespace SPECPREFILL_ISA {

// kLanes: fp32 per vector. kSums: accumulators of a product, held in registers: 24 of 32 registers (AVX-512, NEON), 12
// of 16 (AVX2), 8 of 16 where a product needs a register too (SSE2).
#if defined(__AVX512F__)
constexpr int kLanes = 16, kSums = 24;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kSums = 12;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kSums = 24;
#else
constexpr int kLanes = 4, kSums = 8;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vu16 __attribute__((vector_size(kLanes * 2)));
typedef uint8_t vu8 __attribute__((vector_size(kLanes)));

SPECPREFILL_INLINE vf splat(float x) { return x - vf{}; }

SPECPREFILL_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}

SPECPREFILL_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }

SPECPREFILL_INLINE vf bits_to_float(vu x) { return (vf)x; }

// a * b + c, rounded once where the instruction set can. The same everywhere in one build, so that an element's value
// does not depend on where in a loop it lies.
SPECPREFILL_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// The larger one; NaN in `b` is dropped.
SPECPREFILL_INLINE vf max(vf a, vf b) { return b > a ? b : a; }

SPECPREFILL_INLINE float horizontal_max(vf x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
}

SPECPREFILL_INLINE float horizontal_sum(vf x) {
  float sum = x[0];
  for (int i = 1; i < kLanes; ++i) sum += x[i];
  return sum;
}

// 2^x, relative error below 2e-7 (measured over [-125, 127]; the test of the compiled module holds it to that); 0 below
// -125, Inf from 127.5 on, NaN for NaN.
SPECPREFILL_INLINE vf exp2(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);  // in [-1/2, 1/2], exact
  // The polynomial of degree 6 with the smallest largest relative error on that interval: 1.9e-9 before rounding.
  vf p = splat(1.534581037e-4f);
  p = fma(p, f, splat(1.339993121e-3f));
  p = fma(p, f, splat(9.618488963e-3f));
  p = fma(p, f, splat(5.550328777e-2f));
  p = fma(p, f, splat(2.402264689e-1f));
  p = fma(p, f, splat(6.931472057e-1f));
  p = fma(p, f, splat(1.0f));
  const vf y = (vf)((vu)p + ((vu)shifted << 23));  // the low bits of `shifted` are the integer
  const vf high = x >= splat(127.5f) ? splat(__builtin_inff()) : y;
  const vf inside = x < splat(-125.0f) ? splat(0.0f) : high;
  return x != x ? x : inside;
}

SPECPREFILL_INLINE vf tanh(vf x) {
  const vf square = x * x;
  // Near 0 the other form would subtract numbers that are almost equal.
  vf small = fma(square, splat(-17.0f / 315), splat(2.0f / 15));
  small = fma(square, small, splat(-1.0f / 3));
  small = fma(square * x, small, x);
  const vf e = exp2(x * splat(2.8853900817779268f));  // e^(2x)
  const vf large = splat(1.0f) - splat(2.0f) / (e + splat(1.0f));
  const vf magnitude = x < splat(0.0f) ? -x : x;
  return magnitude < splat(0.2f) ? small : large;
}

// ---- stored dtypes: kLanes consecutive elements as fp32, exactly ----

SPECPREFILL_INLINE vu widen(vu16 x) { return __builtin_convertvector(x, vu); }

struct F32 {
  typedef float stored;
  SPECPREFILL_INLINE vf load(const void* p) { return SPECPREFILL_ISA::load(static_cast<const float*>(p)); }
};

struct BF16 {
  typedef uint16_t stored;
  SPECPREFILL_INLINE vf load(const void* p) {
    vu16 x;
    memcpy(&x, p, sizeof x);
    return bits_to_float(widen(x) << 16);
  }
};

SPECPREFILL_INLINE vf half_to_float(vu16 x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  const vu h = widen(x);
  // Shifted into place, an exponent is 112 too small: a product puts it right, for subnormals too.
  const vu magnitude = (vu)(bits_to_float((h & 0x7fffu) << 13) * splat(5.192296858534828e33f));
  const vu special = (vu)((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
  return bits_to_float(magnitude | special | (h & 0x8000u) << 16);
#endif
}

struct F16 {
  typedef uint16_t stored;
  SPECPREFILL_INLINE vf load(const void* p) {
    vu16 x;
    memcpy(&x, p, sizeof x);
    return half_to_float(x);
  }
};

struct F8E5M2 {  // the upper half of an fp16
  typedef uint8_t stored;
  SPECPREFILL_INLINE vf load(const void* p) {
    vu8 x;
    memcpy(&x, p, sizeof x);
    return half_to_float(__builtin_convertvector(x, vu16) << 8);
  }
};

struct F8E4M3FN {
  typedef uint8_t stored;
  SPECPREFILL_INLINE vf load(const void* p) {
    vu8 x;
    memcpy(&x, p, sizeof x);
    const vu b = __builtin_convertvector(x, vu);
    const vu magnitude =
        (vu)(bits_to_float((b & 0x7fu) << 20) * splat(1.329227995784916e36f));  // exponent 120 too small
    const vu special = (vu)((b & 0x7fu) == 0x7fu) & 0x7fc00000u;                // its only NaN; no Inf
    return bits_to_float(magnitude | special | (b & 0x80u) << 24);
  }
};

// ---- transpose: row i becomes column i of a square of vectors ----

SPECPREFILL_INLINE void transpose(vf (&rows)[kLanes]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d low = _mm512_castps_pd(a[i + k]), high = _mm512_castps_pd(a[i + k + 2]);
      b[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      b[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  // b[4 * g + c] holds, in its four quarters, columns c, c + 4, c + 8, c + 12 of the rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512 even_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 odd_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    rows[c] = (vf)_mm512_shuffle_f32x4(even_low, even_high, 0x88);
    rows[c + 8] = (vf)_mm512_shuffle_f32x4(even_low, even_high, 0xdd);
    rows[c + 4] = (vf)_mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    rows[c + 12] = (vf)_mm512_shuffle_f32x4(odd_low, odd_high, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    rows[c] = (vf)_mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
    rows[c + 4] = (vf)_mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
  }
#else
  vf copy[kLanes];
  for (int i = 0; i < kLanes; ++i) copy[i] = rows[i];
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) rows[i][j] = copy[j][i];
  }
#endif
}

}  // namespace SPECPREFILL_ISA
}  // namespace specprefill
