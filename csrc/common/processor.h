// Which of the instruction sets that the *_simd.cpp files were built for this processor runs.
#pragma once

namespace specprefill {

// 0 generic, 1 AVX2, 2 AVX-512: the best that was built, that the processor has, and that the environment variable
// SPECPREFILL_INSTRUCTION_SET ("generic", "avx2" or "avx512") allows. Asked once, at the first call.
int instruction_set();

}  // namespace specprefill

// The table of kernels `name` of this processor, in namespaces generic, avx2 and avx512.
#if defined(SPECPREFILL_HAVE_AVX512)
#define SPECPREFILL_PICK(name) \
  (instruction_set() == 2 ? avx512::name : instruction_set() == 1 ? avx2::name : generic::name)
#elif defined(SPECPREFILL_HAVE_AVX2)
#define SPECPREFILL_PICK(name) (instruction_set() == 1 ? avx2::name : generic::name)
#else
#define SPECPREFILL_PICK(name) (generic::name)
#endif
