#include "common/processor.h"

#include <cstdlib>
#include <cstring>

namespace specprefill {
namespace {

// SPECPREFILL_INSTRUCTION_SET is an upper bound, to test or to compare; another word bounds nothing.
[[maybe_unused]] bool allowed(int level) {
  static constexpr const char* kNames[] = {"generic", "avx2", "avx512"};
  const char* bound = std::getenv("SPECPREFILL_INSTRUCTION_SET");
  for (int i = 0; bound && i < 3; ++i) {
    if (!std::strcmp(bound, kNames[i])) return level <= i;
  }
  return true;
}

int best() {
#if defined(SPECPREFILL_HAVE_AVX512)
  if (allowed(2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return 2;
  }
#endif
#if defined(SPECPREFILL_HAVE_AVX2)
  // Every processor with AVX2 and FMA so far has F16C too; not every compiler can ask for it.
  if (allowed(1) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

}  // namespace

int instruction_set() {
  static const int level = best();
  return level;
}

}  // namespace specprefill
