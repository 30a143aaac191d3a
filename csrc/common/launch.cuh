// How kernels are launched: checked, on the caller's stream and current device, with an error that says which kernel.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <map>
#include <mutex>
#include <tuple>

#include "common/device.cuh"
#include "common/status.h"

namespace specprefill {

// What a launch is called in an error: the kernel's name and, printf-style, its shapes.
struct LaunchName {
  char text[256];

  __attribute__((format(printf, 2, 3))) explicit LaunchName(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
  }
};

inline int cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return SPECPREFILL_OK;
  return fail(SPECPREFILL_CUDA_ERROR, "%s: %s", what, cudaGetErrorString(error));
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  SPECPREFILL_TRY(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
  return cuda_status(cudaDeviceGetAttribute(value, attribute, device), "cudaDeviceGetAttribute");
}

// What the runtime has said of kernels; asked once, as each question costs a call about a microsecond.
struct KnownKernels {
  std::mutex mutex;
  std::map<std::tuple<const void*, int>, bool> may_share;                  // kernel, device
  std::map<std::tuple<const void*, int, unsigned, size_t>, int> resident;  // and threads, shared memory: blocks

  static KnownKernels& get() {
    static KnownKernels* known =
        new KnownKernels;  // never destroyed: a thread may still launch while the process exits
    return *known;
  }
};

// Lets a kernel take all the shared memory that a block of the current device can have. Always all of it: the limit is
// the kernel's, and two threads that set it to what each needs would undo each other's.
template <class... P>
int allow_shared_memory(void (*kernel)(P...), const char* name) {
  int device = 0, most = 0;
  SPECPREFILL_TRY(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
  KnownKernels& known = KnownKernels::get();
  const std::lock_guard<std::mutex> lock(known.mutex);
  bool& allowed = known.may_share[{reinterpret_cast<const void*>(kernel), device}];
  if (allowed) return SPECPREFILL_OK;
  SPECPREFILL_TRY(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most));
  SPECPREFILL_TRY(cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name));
  allowed = true;
  return SPECPREFILL_OK;
}

template <class... P, class... A>
int launch(const LaunchName& name, void (*kernel)(P...), dim3 grid, unsigned threads, size_t shared_bytes,
           cudaStream_t stream, const A&... arguments) {
  // An error that an earlier call of somebody else left behind is not this launch's.
  (void)cudaGetLastError();
  if (shared_bytes > (48 << 10)) SPECPREFILL_TRY(allow_shared_memory(kernel, name.text));
#if defined(SPECPREFILL_EMULATED)
  (void)stream;
  emulation::launch(grid, dim3(threads), shared_bytes, [=] { kernel(static_cast<P>(arguments)...); });
#else
  // clang-format off: it takes the end of a launch for operators
  kernel<<<grid, threads, shared_bytes, stream>>>(static_cast<P>(arguments)...);
  // clang-format on
#endif
  return cuda_status(cudaGetLastError(), name.text);
}

// Blocks of a kernel that the current device runs at a time: the size of a grid that takes its work by tickets.
template <class... P>
int resident_blocks(void (*kernel)(P...), unsigned threads, size_t shared_bytes, int* blocks) {
  int device = 0, processors = 0, each = 0;
  SPECPREFILL_TRY(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
  if (shared_bytes > (48 << 10)) SPECPREFILL_TRY(allow_shared_memory(kernel, "cudaFuncSetAttribute"));
  KnownKernels& known = KnownKernels::get();
  const std::lock_guard<std::mutex> lock(known.mutex);
  int& answer = known.resident[{reinterpret_cast<const void*>(kernel), device, threads, shared_bytes}];
  if (answer == 0) {
    SPECPREFILL_TRY(device_attribute(cudaDevAttrMultiProcessorCount, &processors));
    SPECPREFILL_TRY(cuda_status(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, static_cast<int>(threads), shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor"));
    answer = processors * (each > 0 ? each : 1);
  }
  *blocks = answer;
  return SPECPREFILL_OK;
}

// Scratch memory of one call: the caller's, or taken from the device's pool and given back behind the work.
class Workspace {
 public:
  Workspace(void* given, size_t given_bytes, size_t needed, cudaStream_t stream)
      : given_(given), given_bytes_(given_bytes), needed_(needed), stream_(stream) {}
  ~Workspace() {
    if (own_) (void)cudaFreeAsync(own_, stream_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // *memory: at least `needed` bytes, a multiple of 256.
  int take(unsigned char** memory) {
    if (!given_) {
      SPECPREFILL_TRY(cuda_status(cudaMallocAsync(&own_, needed_, stream_), "workspace: cudaMallocAsync"));
      *memory = static_cast<unsigned char*>(own_);
      return SPECPREFILL_OK;
    }
    const size_t skip = (kAlign - reinterpret_cast<uintptr_t>(given_) % kAlign) % kAlign;
    SPECPREFILL_REQUIRE(given_bytes_ >= needed_ + skip, "workspace: expected at least %zu bytes, got %zu",
                        needed_ + skip, given_bytes_);
    *memory = static_cast<unsigned char*>(given_) + skip;
    return SPECPREFILL_OK;
  }

  static constexpr size_t kAlign = 256;

 private:
  void* given_;
  size_t given_bytes_, needed_;
  cudaStream_t stream_;
  void* own_ = nullptr;
};

}  // namespace specprefill
