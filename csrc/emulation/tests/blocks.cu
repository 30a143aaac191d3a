// Blocks that work together, in every order that threads may run in.
#include <algorithm>
#include <numeric>

#include "tests.h"

using namespace specprefill;

namespace {

std::string barrier_votes() {
  constexpr unsigned kThreads = 96;
  std::vector<int> out(3 * kThreads), expected(3 * kThreads);
  for (unsigned i = 0; i < kThreads; ++i) {
    expected[3 * i] = 32;
    expected[3 * i + 1] = 1;
    expected[3 * i + 2] = 0;
  }
  const std::string error = launched(1, kThreads, 0, [&] {
    int* mine = &out[3 * threadIdx.x];
    mine[0] = __syncthreads_count(threadIdx.x % 3 == 0);
    mine[1] = __syncthreads_or(threadIdx.x == 95);
    mine[2] = __syncthreads_and(threadIdx.x != 95);
  });
  return error.empty() ? differs(out, expected) : error;
}

// Threads that have exited are not waited for.
std::string early_exits() {
  std::vector<int> out(64), expected(64);
  for (int i = 0; i < 40; ++i) expected[i] = 40;
  const std::string error = launched(1, 64, 0, [&] {
    if (threadIdx.x >= 40) return;
    __syncthreads();
    out[threadIdx.x] = __syncthreads_count(1);
  });
  return error.empty() ? differs(out, expected) : error;
}

std::string places() {
  const unsigned count = 2 * 3 * 4 * 4 * 2 * 8;
  std::vector<int> out(count), expected(count, 1);
  emulation::launch(dim3(2, 3, 4), dim3(4, 2, 8), 0, [&] {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * 64 + thread] += 1;
  });
  return cudaGetLastError() == cudaSuccess ? differs(out, expected) : "does not run";
}

// The k-th largest of many keys, by a histogram per byte.
__global__ void radix_select(const unsigned* keys, unsigned count, unsigned rank, unsigned* out) {
  auto* histogram = reinterpret_cast<unsigned*>(shared_memory());
  unsigned* found = histogram + 256;
  unsigned prefix = 0, left = rank;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < count; i += blockDim.x) {
      const unsigned key = keys[i];
      if (shift == 24 || key >> (shift + 8) == prefix) atomicAdd(&histogram[key >> shift & 255], 1u);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      unsigned digit = 255;
      while (histogram[digit] <= left) left -= histogram[digit--];
      found[0] = prefix << 8 | digit;
      found[1] = left;
    }
    __syncthreads();
    prefix = found[0];
    left = found[1];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = prefix;
}
std::string radix() {
  std::vector<unsigned> keys(1500);
  unsigned x = 12345;
  for (unsigned& key : keys) key = (x = x * 1664525u + 1013904223u) >> (x >> 30) * 8;
  std::vector<unsigned> sorted = keys, out(3);
  std::sort(sorted.begin(), sorted.end(), std::greater<unsigned>());
  for (unsigned rank : {0u, 1u, 700u, 1499u}) {
    const std::string error = launched(3, 256, 258 * 4, [&] { radix_select(keys.data(), 1500, rank, out.data()); });
    if (!error.empty()) return error;
    const std::string wrong = differs(out, std::vector<unsigned>(3, sorted[rank]));
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// Two phases in one launch: rows are summed, and whoever finishes the last one sums those. As many blocks as run at a
// time, fewer, and far more.
__global__ void two_phases(unsigned* counters, unsigned jobs, const int* in, int* sums, int* out) {
  auto* slot = reinterpret_cast<unsigned*>(shared_memory());
  auto* partial = reinterpret_cast<int*>(slot + 1);
  while (true) {
    const unsigned job = next_ticket(counters, slot);
    if (job >= jobs) return;
    const int sum = __reduce_add_sync(kAllLanes, in[job * blockDim.x + threadIdx.x]);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) sums[job] = partial[0] + partial[1];
    if (!finished_last(counters + 1, jobs, slot)) continue;
    if (threadIdx.x == 0) {
      for (unsigned i = 0; i < jobs; ++i) *out += sums[i];
    }
  }
}
std::string phases() {
  for (unsigned blocks : {1u, 5u, 64u, 300u}) {
    constexpr unsigned kJobs = 37;
    std::vector<int> in(kJobs * 64), sums(kJobs), out(1);
    std::iota(in.begin(), in.end(), 1);
    unsigned counters[2] = {};
    const std::string error =
        launched(blocks, 64, 3 * 4, [&] { two_phases(counters, kJobs, in.data(), sums.data(), out.data()); });
    if (!error.empty()) return error;
    const int n = int(in.size());
    const std::string wrong = differs(out, std::vector<int>{n * (n + 1) / 2});
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// Each job waits for the one before it.
__global__ void in_turn(unsigned* counter, unsigned* flags, unsigned jobs, int* out) {
  auto* slot = reinterpret_cast<unsigned*>(shared_memory());
  for (unsigned job; (job = next_ticket(counter, slot)) < jobs;) {
    if (job > 0) wait_for_flag(flags + job - 1);
    const int before = job > 0 ? out[(job - 1) * 64 + 63 - threadIdx.x] : 0;
    out[job * 64 + threadIdx.x] = before + 1;
    raise_flag(flags + job);
  }
}
std::string flags() {
  constexpr unsigned kJobs = 30;
  for (unsigned blocks : {1u, 4u, 90u}) {
    std::vector<unsigned> raised(kJobs);
    std::vector<int> out(kJobs * 64), expected(kJobs * 64);
    for (size_t i = 0; i < out.size(); ++i) expected[i] = int(i / 64) + 1;
    unsigned counter = 0;
    const std::string error = launched(blocks, 64, 4, [&] { in_turn(&counter, raised.data(), kJobs, out.data()); });
    if (!error.empty()) return error;
    const std::string wrong = differs(out, expected);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

// Rows pass through two buffers, the next one on its way while one is summed; the last has 7 bytes.
__global__ void pipeline(const unsigned char* in, int rows, unsigned* out) {
  unsigned char* shared = shared_memory();
  const auto fetch = [&](int row) {
    if (row < rows) {
      const int bytes = row == rows - 1 ? 7 : 16;
      copy_async_16(shared + (row % 2 * 32 + threadIdx.x) * 16, in + (row * 32 + threadIdx.x) * 16, bytes);
    }
    copy_async_commit();
  };
  fetch(0);
  unsigned sum = 0;
  for (int row = 0; row < rows; ++row) {
    fetch(row + 1);
    copy_async_wait<1>();
    __syncwarp();
    const unsigned char* other = shared + (row % 2 * 32 + (threadIdx.x ^ 5)) * 16;
    for (int i = 0; i < 16; ++i) sum += other[i];
    __syncwarp();
  }
  out[threadIdx.x] = sum;
}
std::string copies() {
  constexpr int kRows = 9;
  struct alignas(16) Row {
    unsigned char bytes[32 * 16];
  };
  std::vector<Row> in(kRows);
  std::vector<unsigned> out(32), expected(32);
  for (int row = 0; row < kRows; ++row) {
    for (int i = 0; i < 512; ++i) {
      in[row].bytes[i] = static_cast<unsigned char>(row * 31 + i * 7);
      if (row < kRows - 1 || i % 16 < 7) expected[i / 16 ^ 5] += in[row].bytes[i];
    }
  }
  const std::string error = launched(1, 32, 2 * 512, [&] { pipeline(in[0].bytes, kRows, out.data()); });
  return error.empty() ? differs(out, expected) : error;
}

std::string shared_starts_as_nan() {
  for (int again = 0; again < 2; ++again) {
    const std::string error = launched(2, 32, 1000, [&] {
      if (reinterpret_cast<uintptr_t>(shared_memory()) % 32 != 16) emulation::fail("finds shared memory elsewhere");
      for (int i = threadIdx.x; i < 250; i += 32) reinterpret_cast<int*>(shared_memory())[i] = again;
    });
    if (!error.empty()) return error;
  }
  return "";
}

std::string occupancy() {
  void (*kernel)() = [] {};
  int blocks = 0;
  const auto of = [&](int threads, size_t bytes) {
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, bytes);
    return blocks;
  };
  // 2048 threads, 32 blocks, 228 KiB of which each block has 1 KiB for itself.
  const std::vector<int> got = {of(1024, 0),        of(32, 0),          of(65, 0),
                                of(128, 100 << 10), of(128, 227 << 10), of(128, 228 << 10)};
  return differs(got, {2, 32, 21, 2, 1, 0});
}

}  // namespace

std::vector<Test> blocks() {
  return {{"barrier votes", barrier_votes},
          {"early exits", early_exits},
          {"places", places},
          {"radix select", radix},
          {"phases", phases},
          {"flags", flags},
          {"copies", copies},
          {"shared memory", shared_starts_as_nan},
          {"occupancy", occupancy}};
}
