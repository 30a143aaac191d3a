// Arithmetic that CUDA C++ has names for. Roundings are exact where CUDA's are; functions that CUDA approximates are
// the C library's here.
#pragma once

#include <type_traits>

#include "emulation/language.h"

// ---- bits ----

namespace emulation {

template <class To, class From>
__forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emulation

inline int __float_as_int(float x) { return emulation::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return emulation::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return emulation::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits_as<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(unsigned(x))) << 32 | __brev(unsigned(x >> 32));
}
// Four bytes out of the eight of (y, x); bit 3 of a selector spreads the byte's sign instead.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned selector = selectors >> 4 * i & 0xf;
    unsigned byte = unsigned(bytes >> 8 * (selector & 7)) & 0xff;
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// ---- integers ----

inline int __mulhi(int x, int y) { return int(static_cast<int64_t>(x) * y >> 32); }
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned(static_cast<uint64_t>(x) * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}

// As in CUDA: of two floats, the one that is not NaN.
template <class A, class B>
__forceinline__ typename std::enable_if<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value,
                                        typename std::common_type<A, B>::type>::type
min(A a, B b) {
  using T = typename std::common_type<A, B>::type;
  if constexpr (std::is_floating_point<T>::value) return std::fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
__forceinline__ typename std::enable_if<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value,
                                        typename std::common_type<A, B>::type>::type
max(A a, B b) {
  using T = typename std::common_type<A, B>::type;
  if constexpr (std::is_floating_point<T>::value) return std::fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

// ---- floats ----

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// To integers: NaN becomes 0 and what is out of range the nearest limit, as on a GPU.
namespace emulation {

template <class To, class From>
To saturate(From x) {
  if (!(x == x)) return 0;
  constexpr int kBits = 8 * sizeof(To) - (std::is_signed<To>::value ? 1 : 0);
  const From limit = std::ldexp(From(1), kBits);
  const To largest = static_cast<To>(~uint64_t(0) >> (64 - kBits));
  if (x >= limit) return largest;
  if (std::is_signed<To>::value ? x < -limit : x <= 0) return std::is_signed<To>::value ? To(-largest - 1) : To(0);
  return static_cast<To>(x);
}

}  // namespace emulation

inline int __float2int_rn(float x) { return emulation::saturate<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return emulation::saturate<int>(std::trunc(x)); }
inline int __float2int_rd(float x) { return emulation::saturate<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return emulation::saturate<int>(std::ceil(x)); }
inline unsigned __float2uint_rn(float x) { return emulation::saturate<unsigned>(std::nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return emulation::saturate<unsigned>(std::trunc(x)); }
inline long long __double2ll_rn(double x) { return emulation::saturate<long long>(std::nearbyint(x)); }
inline long long __double2ll_rz(double x) { return emulation::saturate<long long>(std::trunc(x)); }
inline long long __double2ll_rd(double x) { return emulation::saturate<long long>(std::floor(x)); }
inline long long __double2ll_ru(double x) { return emulation::saturate<long long>(std::ceil(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline double __ll2double_rn(long long x) { return static_cast<double>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
