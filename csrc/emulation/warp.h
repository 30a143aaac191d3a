// What the lanes of a warp exchange: shuffles, votes, reductions.
//
// The lanes named in a mask meet; the last one to come works for all. A lane that is not in its own mask is an error,
// and so is a meeting that some lane never comes to. Lanes that have exited need not come.
#pragma once

#include <type_traits>

#include "emulation/language.h"

namespace emulation {

enum class Vote : uint8_t { ballot, any, all };
enum class Fold : uint8_t { add, min, max, bit_and, bit_or, bit_xor };

// The bits that lane `source` gave; of a lane that does not take part, a value that looks like NaN.
uint64_t shuffle(uint32_t mask, uint64_t bits, int source);
uint32_t vote(Vote kind, uint32_t mask, bool predicate);
int64_t fold(Fold kind, uint32_t mask, int64_t value);
// The lanes whose bits are the same as this lane's.
uint32_t match(uint32_t mask, uint64_t bits);
int lane();

template <class T>
T shuffle_value(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 and 8 bytes");
  static_assert(std::is_arithmetic<T>::value, "CUDA shuffles numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Segments of `width` lanes shuffle among themselves.
void check_width(int width);

template <class T>
using Integer = typename std::enable_if<std::is_integral<T>::value && sizeof(T) == 4, T>::type;

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  emulation::check_width(width);
  const int segment = emulation::lane() & ~(width - 1);
  return emulation::shuffle_value(mask, value, segment | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  emulation::check_width(width);
  const int lane = emulation::lane(), end = (lane & ~(width - 1)) + width, source = lane ^ bits;
  return emulation::shuffle_value(mask, value, source < end ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  emulation::check_width(width);
  const int lane = emulation::lane(), place = lane & (width - 1);
  return emulation::shuffle_value(mask, value, static_cast<unsigned>(place) < delta ? lane : lane - int(delta));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  emulation::check_width(width);
  const int lane = emulation::lane(), place = lane & (width - 1);
  const bool inside = delta < static_cast<unsigned>(width - place);
  return emulation::shuffle_value(mask, value, inside ? lane + int(delta) : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::vote(emulation::Vote::ballot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return int(emulation::vote(emulation::Vote::any, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return int(emulation::vote(emulation::Vote::all, mask, predicate != 0));
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  uint64_t bits = 0;
  static_assert(sizeof value <= sizeof bits, "CUDA matches 4 and 8 bytes");
  std::memcpy(&bits, &value, sizeof value);
  return emulation::match(mask, bits);
}

template <class T>
emulation::Integer<T> __reduce_add_sync(unsigned mask, T value) {
  return static_cast<T>(emulation::fold(emulation::Fold::add, mask, value));
}
template <class T>
emulation::Integer<T> __reduce_min_sync(unsigned mask, T value) {
  return static_cast<T>(emulation::fold(emulation::Fold::min, mask, value));
}
template <class T>
emulation::Integer<T> __reduce_max_sync(unsigned mask, T value) {
  return static_cast<T>(emulation::fold(emulation::Fold::max, mask, value));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(emulation::fold(emulation::Fold::bit_and, mask, value));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(emulation::fold(emulation::Fold::bit_or, mask, value));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(emulation::fold(emulation::Fold::bit_xor, mask, value));
}
