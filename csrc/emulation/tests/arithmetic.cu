// Conversions, bits and atomics, one thread at a time.
#include <cmath>
#include <limits>

#include "tests.h"

using namespace specprefill;

namespace {

// Every fp16 there and back, and the roundings between neighbours.
std::string f16() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = f16_to_float(bits);
    const bool nan = (bits & 0x7fff) > 0x7c00;
    const uint32_t back = pack_f16(x, 0) & 0xffff;
    if (nan ? x == x || back != 0x7fff : back != bits) return "fp16 " + std::to_string(bits) + " does not come back";
    if (nan || (bits & 0x7fff) >= 0x7c00) continue;
    const int exponent = bits >> 10 & 31;
    const float expected =
        std::ldexp(float(exponent ? (bits & 0x3ff) + 1024 : bits & 0x3ff), (exponent ? exponent : 1) - 25);
    if (std::fabs(x) != expected) return "fp16 " + std::to_string(bits) + " is not what it means";
    if ((bits & 0x7fff) == 0x7bff) continue;
    const float middle = (x + f16_to_float(bits + 1)) / 2;  // exact in fp32
    const uint32_t even = bits & 1 ? bits + 1 : bits;
    if ((pack_f16(middle, 0) & 0xffff) != even) return "fp16 behind " + std::to_string(bits) + " rounds the wrong way";
    if ((pack_f16(std::nextafter(middle, x), 0) & 0xffff) != bits) return "fp16: not to the nearest";
  }
  const std::vector<uint32_t> got = {pack_f16(65519.0f, 65520.0f), pack_f16(-INFINITY, 1e9f),
                                     pack_f16(1e-30f, -1e-30f)};
  return differs(got, {0x7c007bffu, 0x7c00fc00u, 0x80000000u});
}

std::string bf16() {
  const std::vector<uint32_t> got = {pack_bf16(1.0f, -2.0f),
                                     pack_bf16(__uint_as_float(0x3f808000u), 0),
                                     pack_bf16(__uint_as_float(0x3f818000u), 0),
                                     pack_bf16(__uint_as_float(0x3f808001u), 0),
                                     pack_bf16(INFINITY, NAN),
                                     pack_bf16(3.4e38f, 0)};
  return differs(got, {0xc0003f80u, 0x3f80u, 0x3f82u, 0x3f81u, 0x7fff7f80u, 0x7f80u});
}

std::string bits() {
  const std::vector<long long> got = {__clz(0),
                                      __clz(1),
                                      __clzll(1),
                                      __ffs(0),
                                      __ffs(8),
                                      __popc(0xf0f0u),
                                      __brev(1u),
                                      __byte_perm(0x33221180u, 0x77665544u, 0x8710u),
                                      __funnelshift_l(0x80000000u, 1u, 1u),
                                      __funnelshift_r(0x80000000u, 1u, 1u),
                                      __umulhi(0x80000000u, 6u),
                                      __float2int_rn(2.5f),
                                      __float2int_rn(NAN),
                                      __float2int_rz(-1e20f),
                                      min(3, 5u),
                                      max(-1ll, 2),
                                      (long long)fmaxf(NAN, 7.0f),
                                      (long long)max(3.0f, NAN)};
  return differs(
      got, {32, 31, 63, 0, 4, 8, 0x80000000ll, 0xff771180ll, 3, 0xc0000000ll, 3, 2, 0, -2147483648ll, 3, 2, 7, 3});
}

std::string atomics() {
  unsigned words[8] = {10, 10, 10, 10, 10, 10, 10, 10};
  unsigned long long wide = 1ull << 40;
  float sum = 1;
  int low = 5;
  std::vector<long long> before(10);
  const std::string error = launched(1, 1, 0, [&] {
    before[0] = atomicAdd(words, 5u);
    before[1] = atomicMax(words + 1, 50u);
    before[2] = atomicMin(words + 2, 50u);
    before[3] = atomicOr(words + 3, 5u);
    before[4] = atomicExch(words + 4, 5u);
    before[5] = atomicCAS(words + 5, 10u, 77u);
    before[6] = atomicCAS(words + 6, 11u, 77u);
    before[7] = atomicInc(words + 7, 10u);
    before[8] = (long long)atomicAdd(&wide, 1ull);
    before[9] = atomicMin(&low, -3);
    atomicAdd(&sum, 0.5f);
  });
  if (!error.empty()) return error;
  const std::vector<long long> after = {words[0],
                                        words[1],
                                        words[2],
                                        words[3],
                                        words[4],
                                        words[5],
                                        words[6],
                                        words[7],
                                        (long long)(wide >> 40),
                                        low,
                                        (long long)(2 * sum)};
  const std::string wrong = differs(before, {10, 10, 10, 10, 10, 10, 10, 10, 1ll << 40, 5});
  return wrong.empty() ? differs(after, {15, 50, 10, 15, 5, 77, 10, 0, 1, -3, 3}) : wrong;
}

std::string memory() {
  void* block = nullptr;
  if (cudaMallocAsync(&block, 100, nullptr) != cudaSuccess || reinterpret_cast<uintptr_t>(block) % 256)
    return "no memory";
  const unsigned char first = *static_cast<unsigned char*>(block);
  cudaMemsetAsync(block, 3, 100, nullptr);
  const std::vector<int> got = {first, static_cast<unsigned char*>(block)[99]};
  cudaFreeAsync(block, nullptr);
  if (cudaMallocAsync(&block, ~size_t(0), nullptr) != cudaErrorMemoryAllocation) return "memory without end";
  cudaGetLastError();
  return differs(got, {0xff, 3});
}

}  // namespace

std::vector<Test> arithmetic() {
  return {{"fp16", f16}, {"bf16", bf16}, {"bits", bits}, {"atomics", atomics}, {"memory", memory}};
}
