// The stored dtypes, for code that reads single elements.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "specprefill.h"

namespace specprefill {

inline int64_t item_bytes(int32_t dtype) {
  switch (dtype) {
    case SPECPREFILL_F32: return 4;
    case SPECPREFILL_F16:
    case SPECPREFILL_BF16: return 2;
    default: return 1;
  }
}

inline bool is_dtype(int32_t dtype) { return dtype >= SPECPREFILL_F32 && dtype <= SPECPREFILL_F8_E5M2; }

inline float half_to_float(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa ? NAN : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return h >> 15 ? -magnitude : magnitude;
}

// One query element; queries are F32, F16 or BF16.
inline float to_float(const void* p, int32_t dtype) {
  if (dtype == SPECPREFILL_F32) {
    float x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  uint16_t h;
  std::memcpy(&h, p, sizeof h);
  if (dtype == SPECPREFILL_F16) return half_to_float(h);
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace specprefill
