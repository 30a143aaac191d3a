#include <algorithm>
#include <cmath>

#include "common/guarded.h"
#include "common/launch.cuh"
#include "finalize/source.cuh"
#include "gather/tokens_args.cuh"
#include "select/check.h"
#include "select/kernel.cuh"

namespace specprefill {
namespace {

// Keys that one block holds in shared memory while it ranks: 384K tokens in chunks of 32. More would leave processors
// with 100 KiB none, and come out of the first-level cache as well.
constexpr int64_t kMostHeldKeys = 12288;

long long ll(int64_t x) { return static_cast<long long>(x); }

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

size_t aligned(size_t bytes) { return (bytes + Workspace::kAlign - 1) / Workspace::kAlign * Workspace::kAlign; }

int64_t device_chunk_size(const specprefill_select& args) { return std::min(args.chunk_size, args.max_len); }

// Where everything lies in the workspace.
struct Layout {
  size_t counter_bytes, keys, masses, chunk_ids, bytes;

  explicit Layout(const specprefill_select& args) {
    const auto batch = static_cast<size_t>(args.batch);
    const size_t chunks = batch * static_cast<size_t>(ceil_div(args.max_len, device_chunk_size(args)));
    counter_bytes = (3 + batch) * sizeof(unsigned);
    masses = aligned(counter_bytes);
    keys = masses + (args.budget == SPECPREFILL_KEEP_MASS ? aligned(chunks * sizeof(double)) : 0);
    chunk_ids = keys + aligned(chunks * sizeof(unsigned));
    bytes = chunk_ids + aligned(chunks * sizeof(int32_t));
  }
};

// A selection's importance is a state of one row.
specprefill_finalize importance_as_state(const specprefill_select& args) {
  specprefill_finalize f{};
  f.state = args.importance;
  f.state_stride_batch = args.importance_stride_batch;
  f.state_stride_token = args.importance_stride_token;
  f.batch = args.batch, f.look_ahead = 1, f.max_len = args.max_len;
  f.seq_lens = args.seq_lens;
  f.reduce = SPECPREFILL_MAX;
  f.pool_kernel_size = 1;
  return f;
}

void set_budget(const specprefill_select& args, SelectParams& p) {
  p.by_ratio = args.budget == SPECPREFILL_KEEP_RATIO;
  p.by_mass = args.budget == SPECPREFILL_KEEP_MASS;
  p.budget = static_cast<int>(budget_chunks(args, p.num_chunks));
  p.mass_fraction = args.keep - kMassSlack;
  if (!p.by_ratio) return;
  const auto units = static_cast<int64_t>(std::nearbyint(args.keep * kRatioUnits));
  const bool up = args.rounding == SPECPREFILL_CEIL;
  // Less than nothing is one chunk, as nothing is.
  p.units_per_chunk = up ? std::max<int64_t>(units - kRatioSlack, 0) : units + kRatioSlack;
  p.units_rounding = up ? kRatioUnits - 1 : 0;
}

// How chunks are shared out in the first phase.
int set_chunks(const specprefill_select& args, SelectParams& p) {
  const int64_t size = device_chunk_size(args);
  p.chunk_size = static_cast<int>(size);
  p.num_chunks = static_cast<int>(ceil_div(args.max_len, size));
  int64_t per_job = std::max<int64_t>(kSelectTokens / size, 1);
  if (per_job >= 4) per_job -= per_job % 4;  // tiles start at multiples of 4 tokens
  p.chunks_per_job = static_cast<int>(per_job);
  p.lanes = 1;
  while (p.lanes < kWarp && p.lanes * 4 < size) p.lanes *= 2;
  p.jobs_per_sequence = static_cast<unsigned>(ceil_div(p.num_chunks, per_job));
  p.expand_jobs_per_sequence = static_cast<unsigned>(ceil_div(args.width, kSelectTokens));
  SPECPREFILL_REQUIRE(
      p.jobs_per_sequence <= kMaxSize / args.batch && p.expand_jobs_per_sequence <= kMaxSize / args.batch,
      "importance: expected a [B, T] that memory can hold, got [%lld, %lld]", ll(args.batch), ll(args.max_len));
  return SPECPREFILL_OK;
}

SelectParams select_params(const specprefill_select& args, const specprefill_finalize& source) {
  SelectParams p{};
  p.source = importance_source(source);
  p.importance = source.importance;
  p.protect = args.protect;
  p.protect_stride_batch = args.protect_stride_batch;
  p.protect_stride_token = args.protect_stride_token;
  p.batch = static_cast<unsigned>(args.batch);
  p.sink = static_cast<int>(std::min(args.sink, args.max_len));
  p.tail = static_cast<int>(std::min(args.tail, args.max_len));
  p.indices = args.indices;
  p.num_kept = args.num_kept;
  p.overflow = args.overflow;
  p.width = static_cast<unsigned>(args.width);
  return p;
}

int launch_select(const specprefill_select& args, const specprefill_finalize& source,
                  const specprefill_gather_tokens* gather, void* memory, size_t memory_bytes, cudaStream_t stream) {
  SPECPREFILL_REQUIRE(args.width <= kMaxSize, "indices: expected room for fewer than 2^31 tokens, got %lld",
                      ll(args.width));
  SelectParams p = select_params(args, source);
  SPECPREFILL_TRY(set_chunks(args, p));
  set_budget(args, p);
  p.gathers = gather != nullptr;
  if (gather) SPECPREFILL_TRY(tokens_gather(*gather, kSelectThreads, &p.gather, &p.gather_tiles));
  if (p.gather.shape.words == 0) p.gather_tiles = 0;  // position ids and offsets are written beside the tokens

  const LaunchName name("select_kernel(B=%lld, T=%lld, chunks of %lld, K=%lld%s)", ll(args.batch), ll(args.max_len),
                        ll(args.chunk_size), ll(args.width), gather ? ", with a gather" : "");
  p.held_keys = static_cast<int>(std::min<int64_t>(p.num_chunks, kMostHeldKeys));
  const size_t shared_bytes = sizeof(SelectShared) + static_cast<size_t>(p.held_keys) * sizeof(unsigned);
  int resident = 0;
  SPECPREFILL_TRY(resident_blocks(select_kernel, kSelectThreads, shared_bytes, &resident));
  const unsigned jobs = p.batch * std::max(p.jobs_per_sequence, p.expand_jobs_per_sequence);
  const unsigned blocks = std::min(static_cast<unsigned>(resident), std::max(jobs, p.gather_tiles));

  const Layout layout(args);
  Workspace workspace(memory, memory_bytes, layout.bytes, stream);
  unsigned char* scratch = nullptr;
  SPECPREFILL_TRY(workspace.take(&scratch));
  p.ticket = reinterpret_cast<unsigned*>(scratch);
  p.ranked = p.ticket + 1, p.ready = p.ticket + 2, p.finished = p.ticket + 3;
  p.keys = reinterpret_cast<unsigned*>(scratch + layout.keys);
  p.masses = reinterpret_cast<double*>(scratch + layout.masses);
  p.chunk_ids = reinterpret_cast<int32_t*>(scratch + layout.chunk_ids);
  SPECPREFILL_TRY(cuda_status(cudaMemsetAsync(scratch, 0, layout.counter_bytes, stream), name.text));
  return launch(name, select_kernel, dim3(blocks), kSelectThreads, shared_bytes, stream, p);
}

}  // namespace
}  // namespace specprefill

using namespace specprefill;

size_t specprefill_select_workspace_size_cuda(const specprefill_select* args) {
  size_t bytes = 0;
  guarded("select_workspace_size", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_select, got a null pointer");
    SPECPREFILL_TRY(check_budget(*args));
    bytes = Layout(*args).bytes + Workspace::kAlign;  // wherever it starts
    return SPECPREFILL_OK;
  });
  return bytes;
}

int specprefill_select_cuda(const specprefill_select* args, void* workspace, size_t workspace_bytes, void* stream) {
  return guarded("select_chunks", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_select, got a null pointer");
    SPECPREFILL_TRY(check_select(*args));
    return launch_select(*args, importance_as_state(*args), nullptr, workspace, workspace_bytes,
                         static_cast<cudaStream_t>(stream));
  });
}

int specprefill_select_tokens_cuda(const specprefill_finalize* finalize, const specprefill_select* select,
                                   const specprefill_gather_tokens* gather, void* workspace, size_t workspace_bytes,
                                   void* stream) {
  return guarded("select_tokens", [&]() -> int {
    SPECPREFILL_REQUIRE(finalize && select, "args: expected specprefill_finalize and _select, got a null pointer");
    SPECPREFILL_TRY(check_select_tokens(*finalize, *select, gather));
    return launch_select(*select, *finalize, gather, workspace, workspace_bytes, static_cast<cudaStream_t>(stream));
  });
}
