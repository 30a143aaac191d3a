// Importance from the state. Bytes: N * T fp32 in, T out; one pass, rows summed in their order.
#include <algorithm>
#include <atomic>

#include "common/guarded.h"
#include "common/parallel.h"
#include "common/status.h"
#include "finalize/check.h"
#include "finalize/tile.h"

using namespace specprefill;

int specprefill_finalize_cpu(const specprefill_finalize* args, int num_threads) {
  return guarded("finalize_importance", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_finalize, got a null pointer");
    SPECPREFILL_TRY(check_finalize(*args));
    num_threads = clamp_threads(num_threads);
    Finalizer finalizer(*args, num_threads);
    SPECPREFILL_TRY(finalizer.check());
    std::atomic<bool> finite{true};
    const int64_t tiles = (args->max_len + kFinalizeTile - 1) / kFinalizeTile;
    const int64_t bytes = args->batch * args->max_len * args->look_ahead * int64_t{sizeof(float)};
    parallel_for(args->batch * tiles, threads_for(bytes, num_threads), [&](int64_t task, int worker) {
      const int64_t b = task / tiles, start = task % tiles * kFinalizeTile;
      if (!finalizer.tile(b, start, std::min(start + kFinalizeTile, args->max_len), worker)) finite = false;
    });
    return finite ? static_cast<int>(SPECPREFILL_OK) : finalizer.report();
  });
}
