// Faults within a block. Each kernel has a twin without the fault, which must pass.
#include <memory>

#include "tests.h"

using namespace specprefill;

namespace {

constexpr unsigned kThreads = 64;

float* shared_floats() { return reinterpret_cast<float*>(shared_memory()); }

// A result that must be `of(thread)` for each thread of one block.
template <class K, class F>
std::string check(K kernel, F of, size_t shared_bytes = 4 * kThreads) {
  std::vector<float> out(kThreads, -1), expected(kThreads);
  for (unsigned i = 0; i < kThreads; ++i) expected[i] = of(i);
  const std::string error = launched(1, kThreads, shared_bytes, [&] { kernel(out.data()); });
  return error.empty() ? differs(out, expected) : error;
}

template <bool kFault>
__global__ void missing_syncthreads(float* out) {
  float* shared = shared_floats();
  shared[threadIdx.x] = threadIdx.x;
  if (!kFault) __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}
template <bool kFault>
std::string run_missing_syncthreads() {
  return check(missing_syncthreads<kFault>, [](unsigned i) { return kThreads - 1.0f - i; });
}

// The second step overwrites what the first one is still reading.
template <bool kFault>
__global__ void overwritten_early(float* out) {
  float* shared = shared_floats();
  float sum = 0;
  for (int step = 0; step < 3; ++step) {
    shared[threadIdx.x] = threadIdx.x + step;
    __syncthreads();
    sum += shared[(threadIdx.x + 33) % kThreads];
    if (!kFault) __syncthreads();
  }
  out[threadIdx.x] = sum;
}
template <bool kFault>
std::string run_overwritten_early() {
  return check(overwritten_early<kFault>, [](unsigned i) { return 3.0f * ((i + 33) % kThreads) + 3; });
}

template <bool kFault>
__global__ void missing_syncwarp(float* out) {
  float* shared = shared_floats();
  shared[threadIdx.x] = threadIdx.x;
  if (!kFault) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
template <bool kFault>
std::string run_missing_syncwarp() {
  return check(missing_syncwarp<kFault>, [](unsigned i) { return i ^ 1; });
}

// CUDA promises nothing about memory where lanes vote.
template <bool kFault>
__global__ void vote_as_barrier(float* out) {
  float* shared = shared_floats();
  shared[threadIdx.x] = threadIdx.x;
  if (__any_sync(kAllLanes, threadIdx.x == 5) && !kFault) __syncwarp();
  if (!kFault) __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
template <bool kFault>
std::string run_vote_as_barrier() {
  return check(vote_as_barrier<kFault>, [](unsigned i) { return i ^ 1; });
}

// All threads write one word; atomics may.
template <bool kFault>
__global__ void lost_update(float* out) {
  auto* counter = reinterpret_cast<unsigned*>(shared_memory());
  if (threadIdx.x == 0) *counter = 0;
  __syncthreads();
  if (kFault) {
    const unsigned before = *counter;
    __syncwarp();
    *counter = before + 1;
  } else {
    atomicAdd(counter, 1u);
  }
  __syncthreads();
  out[threadIdx.x] = *counter;
}
template <bool kFault>
std::string run_lost_update() {
  return check(lost_update<kFault>, [](unsigned) { return float(kThreads); });
}

template <bool kFault>
__global__ void unwritten(float* out) {
  float* shared = shared_floats();
  if (!kFault || threadIdx.x != 7) shared[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}
template <bool kFault>
std::string run_unwritten() {
  return check(unwritten<kFault>, [](unsigned) { return 1.0f; });
}

// ---- copies ----

alignas(16) float source[4 * kThreads + 4];

template <bool kFault>
__global__ void missing_copy_wait(float* out) {
  float* shared = shared_floats();
  copy_async_16(shared + 4 * threadIdx.x, source + 4 * threadIdx.x, 16);
  copy_async_commit();
  if (!kFault) copy_async_wait<0>();
  out[threadIdx.x] = shared[4 * threadIdx.x];
  copy_async_wait<0>();
}
template <bool kFault>
std::string run_missing_copy_wait() {
  return check(missing_copy_wait<kFault>, [](unsigned) { return 0.0f; }, 16 * kThreads);
}

// Waits for the first of two groups and reads the second.
template <bool kFault>
__global__ void wrong_copy_group(float* out) {
  float* shared = shared_floats();
  for (int half = 0; half < 2; ++half) {
    copy_async_16(shared + 4 * (threadIdx.x + kThreads * half), source + 4 * threadIdx.x, 16);
    copy_async_commit();
  }
  copy_async_wait<kFault ? 1 : 0>();
  out[threadIdx.x] = shared[4 * (threadIdx.x + kThreads)];
  copy_async_wait<0>();
}
template <bool kFault>
std::string run_wrong_copy_group() {
  return check(wrong_copy_group<kFault>, [](unsigned) { return 0.0f; }, 32 * kThreads);
}

// A copy into a buffer that other threads have not read yet.
template <bool kFault>
__global__ void early_copy(float* out) {
  float* shared = shared_floats();
  for (int i = 0; i < 4; ++i) shared[4 * threadIdx.x + i] = 1;
  __syncthreads();
  const float seen = shared[4 * ((threadIdx.x + 1) % kThreads)];
  if (!kFault) __syncthreads();
  copy_async_16(shared + 4 * threadIdx.x, source + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = seen + shared[4 * threadIdx.x];
}
template <bool kFault>
std::string run_early_copy() {
  return check(early_copy<kFault>, [](unsigned) { return 1.0f; }, 16 * kThreads);
}

template <bool kFault>
__global__ void misaligned_copy(float* out) {
  copy_async_16(shared_memory() + 16 * threadIdx.x, source + 4 * threadIdx.x + (kFault ? 1 : 0), 16);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = 0;
}
template <bool kFault>
std::string run_misaligned_copy() {
  return check(misaligned_copy<kFault>, [](unsigned) { return 0.0f; }, 16 * kThreads);
}

template <bool kFault>
__global__ void copy_outside(float* out) {
  copy_async_16(shared_memory() + 16 * (threadIdx.x + (kFault ? 1 : 0)), source + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<0>();
  out[threadIdx.x] = 0;
}
template <bool kFault>
std::string run_copy_outside() {
  return check(copy_outside<kFault>, [](unsigned) { return 0.0f; }, 16 * kThreads);
}

template <bool kFault>
__global__ void abandoned_copy(float* out) {
  copy_async_16(shared_memory() + 16 * threadIdx.x, source + 4 * threadIdx.x, 16);
  copy_async_commit();
  copy_async_wait<kFault ? 1 : 0>();
  out[threadIdx.x] = 0;
}
template <bool kFault>
std::string run_abandoned_copy() {
  return check(abandoned_copy<kFault>, [](unsigned) { return 0.0f; }, 16 * kThreads);
}

// ---- bounds ----

template <bool kFault>
__global__ void shared_overrun(float* out) {
  shared_floats()[threadIdx.x + (kFault ? 1 : 0)] = 1;
  out[threadIdx.x] = 1;
}
template <bool kFault>
std::string run_shared_overrun() {
  return check(shared_overrun<kFault>, [](unsigned) { return 1.0f; });
}

template <bool kFault>
__global__ void shared_underrun(float* out) {
  shared_floats()[int(threadIdx.x) - (kFault ? 1 : 0)] = 1;
  out[threadIdx.x] = 1;
}
template <bool kFault>
std::string run_shared_underrun() {
  return check(shared_underrun<kFault>, [](unsigned) { return 1.0f; });
}

template <bool kFault>
__global__ void global_overrun(float* out, const float* in) {
  out[threadIdx.x] = in[threadIdx.x + (kFault ? 1 : 0)];
}
template <bool kFault>
std::string run_global_overrun() {
  const std::unique_ptr<float[]> in(new float[kThreads]());
  return check([&](float* out) { global_overrun<kFault>(out, in.get()); }, [](unsigned) { return 0.0f; });
}

// ---- meetings ----

template <bool kFault>
__global__ void divergent_barrier(float* out) {
  if (kFault && threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
template <bool kFault>
std::string run_divergent_barrier() {
  return check(divergent_barrier<kFault>, [](unsigned) { return 1.0f; });
}

template <bool kFault>
__global__ void two_barriers(float* out) {
  if (kFault && threadIdx.x == 3) {
    __syncthreads_or(1);
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}
template <bool kFault>
std::string run_two_barriers() {
  return check(two_barriers<kFault>, [](unsigned) { return 1.0f; });
}

template <bool kFault>
__global__ void not_in_mask(float* out) {
  out[threadIdx.x] = __shfl_sync(kFault ? 0xffffu : kAllLanes, float(threadIdx.x), 0);
}
template <bool kFault>
std::string run_not_in_mask() {
  return check(not_in_mask<kFault>, [](unsigned i) { return float(i / 32 * 32); });
}

template <bool kFault>
__global__ void absent_lanes(float* out) {
  float x = 1;
  if (!kFault || threadIdx.x % 32 < 16) x = __shfl_xor_sync(kAllLanes, x, 1);
  if (kFault) __syncwarp();
  out[threadIdx.x] = x;
}
template <bool kFault>
std::string run_absent_lanes() {
  return check(absent_lanes<kFault>, [](unsigned) { return 1.0f; });
}

template <bool kFault>
__global__ void mma_without_all(float* out) {
  out[threadIdx.x] = 0;
  if (kFault && threadIdx.x % 32 == 31) return;
  float c[4] = {};
  const uint32_t a[4] = {};
  mma_bf16(c, a, 0, 0);
  out[threadIdx.x] = c[0];
}
template <bool kFault>
std::string run_mma_without_all() {
  return check(mma_without_all<kFault>, [](unsigned) { return 0.0f; });
}

template <bool kFault>
__global__ void misaligned_atomic(float* out) {
  auto* words = reinterpret_cast<unsigned*>(shared_memory());
  words[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(reinterpret_cast<unsigned*>(shared_memory() + (kFault ? 2 : 0)), 1u);
  out[threadIdx.x] = 0;
}
template <bool kFault>
std::string run_misaligned_atomic() {
  return check(misaligned_atomic<kFault>, [](unsigned) { return 0.0f; });
}

template <bool kFault>
std::vector<Test> all() {
#define SPECPREFILL_TEST(name) \
  Test { #name, run_##name<kFault> }
  return {
      SPECPREFILL_TEST(missing_syncthreads), SPECPREFILL_TEST(overwritten_early), SPECPREFILL_TEST(missing_syncwarp),
      SPECPREFILL_TEST(vote_as_barrier),     SPECPREFILL_TEST(lost_update),       SPECPREFILL_TEST(unwritten),
      SPECPREFILL_TEST(missing_copy_wait),   SPECPREFILL_TEST(wrong_copy_group),  SPECPREFILL_TEST(early_copy),
      SPECPREFILL_TEST(misaligned_copy),     SPECPREFILL_TEST(copy_outside),      SPECPREFILL_TEST(abandoned_copy),
      SPECPREFILL_TEST(shared_overrun),      SPECPREFILL_TEST(shared_underrun),   SPECPREFILL_TEST(global_overrun),
      SPECPREFILL_TEST(divergent_barrier),   SPECPREFILL_TEST(two_barriers),      SPECPREFILL_TEST(not_in_mask),
      SPECPREFILL_TEST(absent_lanes),        SPECPREFILL_TEST(mma_without_all),   SPECPREFILL_TEST(misaligned_atomic)};
#undef SPECPREFILL_TEST
}

}  // namespace

std::vector<Test> faults() { return all<true>(); }
std::vector<Test> twins() { return all<false>(); }
