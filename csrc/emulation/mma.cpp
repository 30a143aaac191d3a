#include "emulation/mma.h"

#include "emulation/grid.h"

namespace emulation {

namespace {

float bf16_to_float(uint16_t bits) { return bits_as<float>(static_cast<uint32_t>(bits) << 16); }

// NaN becomes the one NaN that the hardware's conversion gives.
uint16_t float_to_bf16(float x) {
  const auto bits = bits_as<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Halves of integers rather than a compiler's own type, which not every compiler has.
uint16_t float_to_f16(float x) {
  const auto bits = bits_as<uint32_t>(x);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  const uint32_t size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return 0x7fff;
  if (size >= 0x47800000u) return sign | 0x7c00;  // 65536 and above
  if (size < 0x38800000u) {
    // Below 2^-14: a multiple of 2^-24. Adding 1/2 leaves exactly those bits of an fp32, rounded to nearest even.
    return sign | static_cast<uint16_t>(bits_as<uint32_t>(bits_as<float>(size) + 0.5f) - 0x3f000000u);
  }
  // A carry may reach the exponent, and make 65520 and above Inf: both are right.
  return sign | static_cast<uint16_t>((size - 0x38000000u + 0xfff + (size >> 13 & 1)) >> 13);
}

template <float (*kToFloat)(uint16_t)>
void multiply_as(Warp& warp) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Call& call = warp.lanes[lane]->call;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float* to = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      to[0] = kToFloat(static_cast<uint16_t>(call.a[i]));
      to[1] = kToFloat(static_cast<uint16_t>(call.a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + i * 8][g] = kToFloat(static_cast<uint16_t>(call.b[i]));
      b[2 * t + i * 8 + 1][g] = kToFloat(static_cast<uint16_t>(call.b[i] >> 16));
    }
  }
  for (int row = 0; row < 16; ++row) {
    float sums[8];
    for (int column = 0; column < 8; ++column) {
      sums[column] = warp.lanes[row % 8 * 4 + column / 2]->call.c[row / 8 * 2 + column % 2];
    }
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[column] += a[row][k] * b[k][column];
    }
    for (int column = 0; column < 8; ++column) {
      warp.lanes[row % 8 * 4 + column / 2]->call.c[row / 8 * 2 + column % 2] = sums[column];
    }
  }
}

}  // namespace

float f16_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, size = bits & 0x7fff;
  if (size >= 0x7c00) return bits_as<float>(sign | 0x7f800000u | (size & 0x3ff) << 13);
  if (size >= 0x0400) return bits_as<float>(sign | ((size << 13) + 0x38000000u));
  const float tiny = static_cast<float>(size) * 0x1p-24f;
  return sign ? -tiny : tiny;
}

uint32_t pack_bf16(float low, float high) {
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
}
uint32_t pack_f16(float low, float high) { return float_to_f16(low) | static_cast<uint32_t>(float_to_f16(high)) << 16; }

void multiply(Warp& warp, Purpose type) {
  if (type == Purpose::mma_bf16) return multiply_as<bf16_to_float>(warp);
  multiply_as<f16_to_float>(warp);
}

}  // namespace emulation
