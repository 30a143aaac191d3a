#include "select/rank.h"

#include <array>
#include <cstring>

namespace specprefill {

uint32_t rank_key(float rank) {
  const float value = rank + 0.0f;  // -0 + 0 is 0
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Digit by digit from the highest: those with a larger digit are among the best, those with a smaller one are out.
uint32_t kth_largest(const std::vector<uint32_t>& keys, int64_t k, std::vector<uint32_t>& spare) {
  const uint32_t* left = keys.data();
  size_t size = keys.size();
  uint32_t found = 0;
  for (int shift : {21, 10, 0}) {
    const uint32_t digits = shift == 0 ? 1023 : 2047;
    std::array<int32_t, 2048> count{};
    for (size_t i = 0; i < size; ++i) ++count[left[i] >> shift & digits];
    uint32_t digit = digits;
    for (; count[digit] < k; --digit) k -= count[digit];
    found |= digit << shift;
    // In place from the second time on: an element moves to where it lies, or before.
    size_t same = 0;
    for (size_t i = 0; i < size; ++i) {
      const uint32_t key = left[i];
      spare[same] = key;
      same += (key >> shift & digits) == digit;
    }
    left = spare.data(), size = same;
  }
  return found;
}

}  // namespace specprefill
