// Atomic operations on global and shared memory, for the types that CUDA has them for.
#pragma once

#include "emulation/language.h"

namespace emulation {

enum class Update : uint8_t { add, sub, min, max, bit_and, bit_or, bit_xor, exchange, increment, decrement };

// The value before. Defined for the types used below.
template <class T>
T update(Update kind, T* address, T operand);
template <class T>
T compare_and_swap(T* address, T expected, T desired);

}  // namespace emulation

#define SPECPREFILL_ATOMIC(name, kind, type) \
  inline type name(type* address, type operand) { return emulation::update(emulation::Update::kind, address, operand); }
#define SPECPREFILL_ATOMIC_INTEGERS(name, kind) \
  SPECPREFILL_ATOMIC(name, kind, int)           \
  SPECPREFILL_ATOMIC(name, kind, unsigned)      \
  SPECPREFILL_ATOMIC(name, kind, unsigned long long)

SPECPREFILL_ATOMIC_INTEGERS(atomicAdd, add)
SPECPREFILL_ATOMIC(atomicAdd, add, float)
SPECPREFILL_ATOMIC(atomicAdd, add, double)
SPECPREFILL_ATOMIC(atomicSub, sub, int)
SPECPREFILL_ATOMIC(atomicSub, sub, unsigned)
SPECPREFILL_ATOMIC_INTEGERS(atomicMin, min)
SPECPREFILL_ATOMIC(atomicMin, min, long long)
SPECPREFILL_ATOMIC_INTEGERS(atomicMax, max)
SPECPREFILL_ATOMIC(atomicMax, max, long long)
SPECPREFILL_ATOMIC_INTEGERS(atomicAnd, bit_and)
SPECPREFILL_ATOMIC_INTEGERS(atomicOr, bit_or)
SPECPREFILL_ATOMIC_INTEGERS(atomicXor, bit_xor)
SPECPREFILL_ATOMIC_INTEGERS(atomicExch, exchange)
SPECPREFILL_ATOMIC(atomicExch, exchange, float)
SPECPREFILL_ATOMIC(atomicInc, increment, unsigned)
SPECPREFILL_ATOMIC(atomicDec, decrement, unsigned)

#undef SPECPREFILL_ATOMIC_INTEGERS
#undef SPECPREFILL_ATOMIC

inline int atomicCAS(int* address, int expected, int desired) {
  return emulation::compare_and_swap(address, expected, desired);
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned desired) {
  return emulation::compare_and_swap(address, expected, desired);
}
inline unsigned long long atomicCAS(unsigned long long* address, unsigned long long expected,
                                    unsigned long long desired) {
  return emulation::compare_and_swap(address, expected, desired);
}
