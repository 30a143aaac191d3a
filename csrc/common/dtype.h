// The stored dtypes, for code that reads single elements.
#pragma once

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

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float half_to_float(uint16_t h) {
  // Shifted into place, an exponent is 112 too small: a product puts it right, for subnormals too.
  const float magnitude = float_of_bits((h & 0x7fffu) << 13) * 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  return float_of_bits(bits | (h & 0x8000u) << 16);
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
  return float_of_bits(static_cast<uint32_t>(h) << 16);
}

}  // namespace specprefill
