#include "emulation/runtime.h"

#include <cstdlib>
#include <limits>

#include "emulation/scheduler.h"

namespace {

thread_local cudaError_t last_error = cudaSuccess;
thread_local std::string last_message;

cudaError_t set_error(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch_error(cudaError_t error, const std::string& message) {
  last_message = message;
  return set_error(error);
}

emulation::Device device() {
  std::string problem;
  return emulation::device_from_environment(&problem);
}

}  // namespace

namespace emulation {

namespace {

thread_local Scheduler scheduler;
thread_local uint64_t launches = 0;

// "" or what is wrong with a launch's numbers. CUDA says no more than "invalid configuration".
std::string problem_of(dim3 grid, dim3 block, size_t shared_bytes, const Device& device) {
  const auto text = [](dim3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
  };
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) return "grid " + text(grid) + ": a dimension is 0";
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return "grid " + text(grid) + ": expected at most (2147483647, 65535, 65535)";
  }
  if (block.x < 1 || block.y < 1 || block.z < 1) return "block " + text(block) + ": a dimension is 0";
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || uint64_t(block.x) * block.y * block.z > 1024) {
    return "block " + text(block) + ": expected at most 1024 threads, and (1024, 1024, 64)";
  }
  if (shared_bytes > device.shared_bytes()) {
    return std::to_string(shared_bytes) + " bytes of shared memory: a block has at most " +
           std::to_string(device.shared_bytes());
  }
  return "";
}

}  // namespace

void launch(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& thread) {
  std::string problem;
  const Device device = device_from_environment(&problem);
  Grid grid;
  grid.order = order_from_environment(&problem);
  if (!problem.empty()) {
    launch_error(cudaErrorInvalidValue, problem);
    return;
  }
  if (self) fail("launches a kernel: only the host can");
  problem = problem_of(grid_size, block_size, shared_bytes, device);
  if (!problem.empty()) {
    launch_error(cudaErrorInvalidConfiguration, problem);
    return;
  }
  grid.thread = &thread;
  grid.size = grid_size;
  grid.block_size = block_size;
  grid.blocks = uint64_t(grid_size.x) * grid_size.y * grid_size.z;
  grid.threads = block_size.x * block_size.y * block_size.z;
  grid.shared_bytes = shared_bytes;
  grid.random = Random(grid.order.seed * 0x100000001b3ull + ++launches);
  const int each = blocks_on_processor(device, grid.threads, shared_bytes);
  if (!scheduler.run(grid, uint64_t(each) * static_cast<unsigned>(device.processors))) {
    launch_error(cudaErrorLaunchFailure, grid.error + " [emulated, order " + grid.order.text() + ", launch " +
                                             std::to_string(launches) + " of this thread]");
  }
}

cudaError_t set_dynamic_shared_limit(int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > device().shared_bytes()) {
    return launch_error(cudaErrorInvalidValue, std::to_string(bytes) + " bytes of shared memory: a block has at most " +
                                                   std::to_string(device().shared_bytes()));
  }
  return cudaSuccess;
}

cudaError_t blocks_per_processor(int* blocks, int threads, size_t shared_bytes) {
  if (!blocks || threads < 1) return set_error(cudaErrorInvalidValue);
  *blocks = blocks_on_processor(device(), static_cast<uint64_t>(threads), shared_bytes);
  return cudaSuccess;
}

}  // namespace emulation

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return last_message.empty() ? "invalid argument" : last_message.c_str();
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return last_message.empty() ? "invalid configuration" : last_message.c_str();
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorLaunchFailure: return last_message.empty() ? "unspecified launch failure" : last_message.c_str();
  }
  return "unrecognized error code";
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : set_error(cudaErrorInvalidDevice); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return set_error(cudaErrorInvalidDevice);
  const emulation::Device of = device();
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 << 10; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = of.processors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = emulation::Device::kThreads; break;
    case cudaDevAttrL2CacheSize: *value = 32 << 20; break;
    case cudaDevAttrComputeCapabilityMajor: *value = of.compute_capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = of.compute_capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = static_cast<int>(of.shared_bytes_of_processor()); break;
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(of.shared_bytes()); break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = emulation::Device::kReservedShared; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = emulation::Device::kBlocks; break;
    default: return set_error(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > std::numeric_limits<size_t>::max() / 2 || posix_memalign(memory, 256, bytes)) {
    *memory = nullptr;
    return set_error(cudaErrorMemoryAllocation);
  }
  // Nobody may rely on what fresh memory holds.
  std::memset(*memory, 0xff, bytes);
  return cudaSuccess;
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) { return cudaMalloc(memory, bytes); }
cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return cudaFree(memory); }

cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  if (bytes) std::memset(memory, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, value, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = cudaFuncAttributes{};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = device().compute_capability;
  attributes->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}
