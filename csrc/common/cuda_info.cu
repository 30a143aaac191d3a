// What this build has CUDA code for, and whether the current device can run it. Nothing here makes a CUDA context: a
// process that only asks takes no memory on a GPU.
#include <cstdio>
#include <cstring>

#include "common/cuda_info.h"
#include "common/device.cuh"
#include "common/status.h"

#if defined(SPECPREFILL_EMULATED)
#define SPECPREFILL_CUDA_ARCHITECTURES "emulated"
#elif !defined(SPECPREFILL_CUDA_ARCHITECTURES)
#error "SPECPREFILL_CUDA_ARCHITECTURES: expected what the build compiles for, as in \"sm_80 sm_90 compute_120\""
#endif

namespace specprefill {
namespace {

constexpr int kLeastMajor = 8;  // bf16 tensor cores and cp.async

// "13.0" of CUDA's 13000.
struct Version {
  int number = 0;
  int major() const { return number / 1000; }
  int minor() const { return number % 1000 / 10; }
};

bool runs_on(const char* architectures, int major, int minor) {
  for (const char* word = architectures; *word;) {
    int number = 0;
    char suffix = ' ';
    // sm_90a runs on 9.0 alone, sm_100f on all of 10.
    if (std::sscanf(word, "sm_%d%c", &number, &suffix) >= 1) {
      const bool exact = suffix == 'a';
      if (number / 10 == major && (exact ? number % 10 == minor : number % 10 <= minor)) return true;
    } else if (std::sscanf(word, "compute_%d%c", &number, &suffix) >= 1) {
      // With a suffix, PTX is as little for others as binaries are.
      const bool same = number / 10 == major && (suffix == 'a' ? number % 10 == minor : number % 10 <= minor);
      if (suffix == 'a' || suffix == 'f' ? same : number <= 10 * major + minor) return true;
    } else {
      return true;
    }
    const char* space = std::strchr(word, ' ');
    if (!space) break;
    word = space + 1;
  }
  return false;
}

int check_driver() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();  // whoever asks next must not get this call's error
#if !defined(SPECPREFILL_EMULATED)
  if (error == cudaErrorInsufficientDriver) {
    Version driver, runtime;
    (void)cudaDriverGetVersion(&driver.number);
    (void)cudaRuntimeGetVersion(&runtime.number);
    if (driver.number == 0) return fail(SPECPREFILL_CUDA_ERROR, "no NVIDIA driver");
    return fail(SPECPREFILL_CUDA_ERROR, "the NVIDIA driver is for CUDA %d.%d, and this build needs one for %d.%d",
                driver.major(), driver.minor(), runtime.major(), runtime.minor());
  }
#endif
  if (error != cudaSuccess) return fail(SPECPREFILL_CUDA_ERROR, "%s", cudaGetErrorString(error));
  if (count == 0) return fail(SPECPREFILL_CUDA_ERROR, "no GPU");
  return SPECPREFILL_OK;
}

int check_device() {
  SPECPREFILL_TRY(check_driver());
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return fail(SPECPREFILL_CUDA_ERROR, "%s", cudaGetErrorString(error));
  return check_capability(SPECPREFILL_CUDA_ARCHITECTURES, major, minor);
}

}  // namespace

int check_capability(const char* architectures, int major, int minor) {
  if (major < kLeastMajor) {
    return fail(SPECPREFILL_CUDA_ERROR, "a GPU of compute capability %d.%d, and the kernels need %d.0", major, minor,
                kLeastMajor);
  }
  if (runs_on(architectures, major, minor)) return SPECPREFILL_OK;
  return fail(SPECPREFILL_CUDA_ERROR,
              "a GPU of compute capability %d.%d, and this build has code for %s: build it again with "
              "SPECPREFILL_CUDA_ARCHITECTURES=%d%d",
              major, minor, architectures, major, minor);
}

}  // namespace specprefill

const char* specprefill_cuda_unavailable(void) {
  specprefill::clear_error();
  return specprefill::check_device() == SPECPREFILL_OK ? "" : specprefill_last_error();
}

const char* specprefill_cuda_architectures(void) { return SPECPREFILL_CUDA_ARCHITECTURES; }
