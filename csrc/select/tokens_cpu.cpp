// From the state to packed tokens in one call. Bytes: the state once, and each tile's importance is summed by chunks
// while it is in L1; importance, indices, positions and values are written once.
#include <algorithm>
#include <atomic>
#include <vector>

#include "common/guarded.h"
#include "common/parallel.h"
#include "common/status.h"
#include "finalize/tile.h"
#include "gather/tokens.h"
#include "select/check.h"
#include "select/selector.h"

namespace specprefill {
namespace {

// What the kernels on a GPU do not read, or clamp.
int check_places(const specprefill_select& select, const specprefill_gather_tokens* gather) {
  SPECPREFILL_REQUIRE(
      select.importance_stride_token == 1 && (select.batch == 1 || select.importance_stride_batch == select.max_len),
      "select: expected finalize's importance, contiguous [B, T], got strides [%lld, %lld]",
      static_cast<long long>(select.importance_stride_batch), static_cast<long long>(select.importance_stride_token));
  if (!gather) return SPECPREFILL_OK;
  SPECPREFILL_REQUIRE(gather->batch == 1 || gather->indices_stride == gather->width,
                      "gather: expected select's indices, contiguous [B, K], got a stride of %lld",
                      static_cast<long long>(gather->indices_stride));
  SPECPREFILL_REQUIRE(!gather->cu_seqlens, "gather: expected no cu_seqlens, got some");
  SPECPREFILL_REQUIRE(gather->tokens >= select.max_len, "x: expected at least %lld tokens, got %lld",
                      static_cast<long long>(select.max_len), static_cast<long long>(gather->tokens));
  return SPECPREFILL_OK;
}

}  // namespace
}  // namespace specprefill

using namespace specprefill;

int specprefill_select_tokens_cpu(const specprefill_finalize* finalize, const specprefill_select* select,
                                  const specprefill_gather_tokens* gather, int num_threads) {
  return guarded("select_tokens", [&]() -> int {
    SPECPREFILL_REQUIRE(finalize && select, "args: expected specprefill_finalize and _select, got a null pointer");
    SPECPREFILL_TRY(check_select_tokens(*finalize, *select, gather));
    SPECPREFILL_TRY(check_places(*select, gather));
    num_threads = clamp_threads(num_threads);
    Finalizer finalizer(*finalize, num_threads);
    SPECPREFILL_TRY(finalizer.check());
    std::vector<Selector> selectors;
    for (int64_t b = 0; b < select->batch; ++b) selectors.emplace_back(*select, b);
    std::vector<std::atomic<bool>> rejected(selectors.size());
    std::atomic<bool> finite{true};
    // A tile is whole chunks; a chunk longer than a tile is several, and read with the last of them.
    const int64_t size = select->chunk_size, max_len = select->max_len;
    const int64_t chunks = std::min(std::max<int64_t>(kFinalizeTile / size, 1), Selector::kChunks);
    const int64_t tile = std::min(chunks, (max_len - 1) / size + 1) * size, tiles = (max_len - 1) / tile + 1;
    const int64_t bytes = select->batch * max_len * finalize->look_ahead * int64_t{sizeof(float)};
    parallel_for(select->batch * tiles, threads_for(bytes, num_threads), [&](int64_t task, int worker) {
      const size_t b = static_cast<size_t>(task / tiles);
      const int64_t start = task % tiles * tile, stop = std::min(start + tile, max_len);
      for (int64_t t = start; t < stop; t += kFinalizeTile) {
        const int64_t end = std::min(t + kFinalizeTile, stop);
        if (!finalizer.tile(static_cast<int64_t>(b), t, end, worker)) finite = false;
      }
      const int64_t first = start / size, last = std::min(first + chunks, selectors[b].num_chunks());
      if (first < last && !selectors[b].read(first, last)) rejected[b] = true;
    });
    if (!finite) SPECPREFILL_TRY(finalizer.report());
    for (size_t b = 0; b < selectors.size(); ++b) {
      if (rejected[b]) SPECPREFILL_TRY(selectors[b].reject());
    }
    parallel_for(select->batch, threads_for(bytes, num_threads),
                 [&](int64_t b, int) { selectors[static_cast<size_t>(b)].choose(); });
    if (gather) gather_tokens(*gather, num_threads);
    return SPECPREFILL_OK;
  });
}
