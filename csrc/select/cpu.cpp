// Chunk selection. Bytes: T fp32 in, the kept positions out; ranking is a selection in linear time, not a sort.
#include <algorithm>
#include <atomic>
#include <vector>

#include "common/guarded.h"
#include "common/parallel.h"
#include "common/sequences.h"
#include "common/status.h"
#include "select/check.h"
#include "select/selector.h"

using namespace specprefill;

int specprefill_select_cpu(const specprefill_select* args, int num_threads) {
  return guarded("select_chunks", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_select, got a null pointer");
    SPECPREFILL_TRY(check_select(*args));
    SPECPREFILL_TRY(check_lengths("seq_lens", args->seq_lens, args->batch, args->max_len));
    num_threads = clamp_threads(num_threads);
    std::vector<Selector> selectors;
    for (int64_t b = 0; b < args->batch; ++b) selectors.emplace_back(*args, b);
    std::vector<std::atomic<bool>> rejected(selectors.size());
    const int64_t chunks = (args->max_len - 1) / args->chunk_size + 1;
    const int64_t blocks = (chunks + Selector::kChunks - 1) / Selector::kChunks;
    const int64_t bytes = args->batch * args->max_len * int64_t{sizeof(float)};
    parallel_for(args->batch * blocks, threads_for(bytes, num_threads), [&](int64_t task, int) {
      const size_t b = static_cast<size_t>(task / blocks);
      const int64_t first = task % blocks * Selector::kChunks;
      const int64_t last = std::min(first + Selector::kChunks, selectors[b].num_chunks());
      if (first < last && !selectors[b].read(first, last)) rejected[b] = true;
    });
    for (size_t b = 0; b < selectors.size(); ++b) {
      if (rejected[b]) SPECPREFILL_TRY(selectors[b].reject());
    }
    parallel_for(args->batch, threads_for(bytes, num_threads),
                 [&](int64_t b, int) { selectors[static_cast<size_t>(b)].choose(); });
    return SPECPREFILL_OK;
  });
}
