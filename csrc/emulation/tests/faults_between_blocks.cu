// Faults between the blocks of a grid, and of launches. Each kernel has a twin without the fault, which must pass.
#include "tests.h"

using namespace specprefill;

namespace {

constexpr unsigned kThreads = 64, kBlocks = 6;

template <bool kFault>
__global__ void same_word(float* out) {
  out[kFault ? 0 : blockIdx.x] = blockIdx.x;
}
template <bool kFault>
std::string run_same_word() {
  std::vector<float> out(kBlocks), expected(kBlocks);
  for (unsigned i = 0; i < kBlocks; ++i) expected[i] = i;
  const std::string error = launched(kBlocks, 1, 0, [&] { same_word<kFault>(out.data()); });
  return error.empty() ? differs(out, expected) : error;
}

// Each block waits for the one before it. Fault: the flag is raised before all threads have written.
template <bool kFault>
__global__ void chain(unsigned* counter, unsigned* flags, float* out) {
  auto* slot = reinterpret_cast<unsigned*>(shared_memory());
  const unsigned job = next_ticket(counter, slot);
  float before = 0;
  if (job > 0) {
    wait_for_flag(flags + job - 1);
    before = out[(job - 1) * kThreads + kThreads - 1 - threadIdx.x];
  }
  out[job * kThreads + threadIdx.x] = before + 1;
  if (kFault) {
    if (threadIdx.x == 0) store_release(flags + job, 1u);
  } else {
    raise_flag(flags + job);
  }
}
template <bool kFault>
std::string run_chain() {
  std::vector<unsigned> flags(kBlocks);
  std::vector<float> out(kBlocks * kThreads), expected(kBlocks * kThreads);
  for (unsigned i = 0; i < expected.size(); ++i) expected[i] = 1.0f + i / kThreads;
  unsigned counter = 0;
  const std::string error = launched(kBlocks, kThreads, 4, [&] { chain<kFault>(&counter, flags.data(), out.data()); });
  return error.empty() ? differs(out, expected) : error;
}

// The last block sums what all have written. The faults leave out a fence: invisible here but for the race detector.
template <bool kBefore, bool kAfter>
__global__ void last_sums(unsigned* counter, float* out) {
  auto* slot = reinterpret_cast<unsigned*>(shared_memory());
  out[1 + blockIdx.x * kThreads + threadIdx.x] = 1;
  if (kBefore) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *slot = atomicAdd(counter, 1u);
  __syncthreads();
  if (*slot != gridDim.x - 1) return;
  if (kAfter) __threadfence();
  if (threadIdx.x > 0) return;
  float sum = 0;
  for (unsigned i = 0; i < kBlocks * kThreads; ++i) sum += out[1 + i];
  out[0] = sum;
}
template <bool kBefore, bool kAfter>
std::string run_last_sums() {
  std::vector<float> out(1 + kBlocks * kThreads);
  unsigned counter = 0;
  const std::string error = launched(kBlocks, kThreads, 4, [&] { last_sums<kBefore, kAfter>(&counter, out.data()); });
  return error.empty() ? differs(out, std::vector<float>{kBlocks * kThreads}) : error;
}
template <bool kFault>
std::string run_missing_fence_before() {
  return run_last_sums<!kFault, true>();
}
template <bool kFault>
std::string run_missing_fence_after() {
  return run_last_sums<true, !kFault>();
}

// A flag in the older manner: volatile, with fences.
template <bool kFault>
__global__ void volatile_flag(volatile unsigned* flag, float* out) {
  if (blockIdx.x == 0) {
    out[1] = 5;
    if (!kFault) __threadfence();
    *flag = 1;
    return;
  }
  while (*flag == 0) __nanosleep(20);
  if (!kFault) __threadfence();
  out[0] = out[1];
}
template <bool kFault>
std::string run_volatile_flag() {
  unsigned flag = 0;
  std::vector<float> out(2);
  const std::string error = launched(2, 1, 0, [&] { volatile_flag<kFault>(&flag, out.data()); });
  return error.empty() ? differs(out, std::vector<float>{5, 5}) : error;
}

template <bool kFault>
__global__ void endless_wait(unsigned* flags) {
  if (!kFault && blockIdx.x == 0) raise_flag(flags);
  wait_for_flag(flags);
}
template <bool kFault>
std::string run_endless_wait() {
  unsigned flag = 0;
  return launched(kBlocks, kThreads, 0, [&] { endless_wait<kFault>(&flag); });
}

// Without a sleep in it.
template <bool kFault>
__global__ void endless_spin(unsigned* flag) {
  if (!kFault && blockIdx.x == 1) atomicExch(flag, 1u);
  while (atomicAdd(flag, 0u) == 0) {
  }
}
template <bool kFault>
std::string run_endless_spin() {
  unsigned flag = 0;
  return launched(2, 32, 0, [&] { endless_spin<kFault>(&flag); });
}

// Block 0 waits for the last one, of more than fit the device: on a GPU it never starts.
template <bool kFault>
std::string run_waits_for_the_last() {
  unsigned flag = 0;
  const unsigned last = kFault ? 4000 : 3;
  return launched(last + 1, 32, 0, [&] {
    if (blockIdx.x == last) atomicExch(&flag, 1u);
    if (blockIdx.x < last && blockIdx.x < 256) wait_for_flag(&flag);
  });
}

template <bool kFault>
std::string run_no_blocks() {
  return launched(dim3(kFault ? 0 : 1), 32, 0, [] {});
}
template <bool kFault>
std::string run_high_grid() {
  return launched(dim3(1, 1, kFault ? 65536 : 2), 32, 0, [] {});
}
template <bool kFault>
std::string run_large_block() {
  return launched(1, kFault ? 1025 : 1024, 0, [] { __syncthreads(); });
}
template <bool kFault>
std::string run_large_shared() {
  return launched(1, 32, (227 << 10) + (kFault ? 1 : 0), [] { shared_memory()[threadIdx.x] = 1; });
}
template <bool kFault>
std::string run_trap() {
  return launched(1, 32, 0, [] {
    if (kFault && threadIdx.x == 9) __trap();
  });
}

template <bool kFault>
std::vector<Test> all() {
#define SPECPREFILL_TEST(name) \
  Test { #name, run_##name<kFault> }
  return {SPECPREFILL_TEST(same_word),
          SPECPREFILL_TEST(chain),
          SPECPREFILL_TEST(missing_fence_before),
          SPECPREFILL_TEST(missing_fence_after),
          SPECPREFILL_TEST(volatile_flag),
          SPECPREFILL_TEST(endless_wait),
          SPECPREFILL_TEST(endless_spin),
          SPECPREFILL_TEST(waits_for_the_last),
          SPECPREFILL_TEST(no_blocks),
          SPECPREFILL_TEST(high_grid),
          SPECPREFILL_TEST(large_block),
          SPECPREFILL_TEST(large_shared),
          SPECPREFILL_TEST(trap)};
#undef SPECPREFILL_TEST
}

}  // namespace

std::vector<Test> faults_between_blocks() { return all<true>(); }
std::vector<Test> twins_between_blocks() { return all<false>(); }
