// Ranks as integers, and the k-th largest of them in linear time.
#pragma once

#include <cstdint>
#include <vector>

namespace specprefill {

constexpr uint32_t kForced = 0xffffffffu;  // above the key of every number

// Orders finite numbers as `<` does; both zeros have one key.
uint32_t rank_key(float rank);

// The k-th largest of the keys, 1 <= k <= their number. `spare` has their size; what it holds is lost.
uint32_t kth_largest(const std::vector<uint32_t>& keys, int64_t k, std::vector<uint32_t>& spare);

}  // namespace specprefill
