#include "common/guarded.h"
#include "common/launch.cuh"
#include "finalize/check.h"
#include "finalize/kernel.cuh"
#include "finalize/source.cuh"

using namespace specprefill;

int specprefill_finalize_cuda(const specprefill_finalize* args, void* stream) {
  return guarded("finalize_importance", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_finalize, got a null pointer");
    SPECPREFILL_TRY(check_finalize(*args));
    const auto batch = static_cast<long long>(args->batch), max_len = static_cast<long long>(args->max_len);
    const int64_t tiles = (args->max_len + kFinalizeTokens - 1) / kFinalizeTokens;
    SPECPREFILL_REQUIRE(tiles <= kMaxSize / args->batch,
                        "state: expected a [B, T] that memory can hold, got [%lld, %lld]", batch, max_len);
    const LaunchName name("finalize_kernel(B=%lld, N=%lld, T=%lld)", batch, static_cast<long long>(args->look_ahead),
                          max_len);
    return launch(name, finalize_kernel, dim3(static_cast<unsigned>(args->batch * tiles)), kFinalizeThreads, 0,
                  static_cast<cudaStream_t>(stream), importance_source(*args), args->importance,
                  static_cast<unsigned>(tiles));
  });
}
