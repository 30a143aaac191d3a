// The score in CUDA behind the C interface: which layers go together, on which kernel, and how their work is cut.
#include <algorithm>
#include <vector>

#include "common/arena.h"
#include "common/dtype.h"
#include "common/guarded.h"
#include "common/launch.cuh"
#include "score/check.h"
#include "score/kernels.h"
#include "score/params.cuh"

namespace specprefill {
namespace {

long long ll(int64_t x) { return static_cast<long long>(x); }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tickets of a launch: below 2^32 with those that blocks draw in vain.
constexpr int64_t kMostTickets = int64_t{1} << 31;

// ---- sizes ----

ScoreRows rows_for(int64_t look_ahead, int64_t group) {
  ScoreRows rows{};
  while (rows.span_bits < 3 && (int64_t{1} << rows.span_bits) < look_ahead) ++rows.span_bits;
  rows.octets_across = static_cast<int32_t>(ceil_div(group, 8 >> rows.span_bits));
  rows.octets = static_cast<int32_t>(ceil_div(look_ahead, int64_t{1} << rows.span_bits) * rows.octets_across);
  return rows;
}

// Scratch memory of a launch.
struct Scratch {
  uint32_t* counters;  // the next ticket; then sums_done and norm_ready
  float* norms;
  float2* partials;

  // rows: of all items.
  Scratch(int64_t items, int64_t rows, int64_t sum_jobs, Arena& arena)
      : counters(arena.take<uint32_t>(items + 1, 2)),
        norms(arena.take<float>(rows)),
        partials(arena.take<float2>(rows, sum_jobs)) {}
};

// ---- which layers go together ----

bool is_aligned(const specprefill_score& args, const specprefill_layer& layer) {
  constexpr int64_t kAlign = 16;
  const int64_t bytes = item_bytes(layer.key_dtype);
  const auto odd = [&](int64_t stride, int64_t count) { return count > 1 && stride * bytes % kAlign != 0; };
  if (reinterpret_cast<uintptr_t>(layer.key) % kAlign != 0) return false;
  if (layer.key_stride_dim != 1 && layer.head_dim > 1) return false;
  const int64_t key_rows = args.layout == SPECPREFILL_DENSE ? args.batch : layer.key_rows;
  return !odd(layer.key_stride_row, key_rows) && !odd(layer.key_stride_head, layer.num_kv_heads) &&
         !odd(layer.key_stride_token, layer.key_tokens);
}

// Whether four elements of a query's row can be read as 8 bytes.
bool is_query_aligned(const specprefill_layer& layer) {
  const auto odd = [](int64_t stride) { return stride % 4 != 0; };
  return reinterpret_cast<uintptr_t>(layer.query) % 8 == 0 && layer.query_stride_dim == 1 && layer.head_dim % 4 == 0 &&
         !odd(layer.query_stride_batch) && !odd(layer.query_stride_row) && !odd(layer.query_stride_head);
}

// Whether two layers differ in their addresses, scale and window only.
bool alike(const specprefill_score& args, const specprefill_layer& a, const specprefill_layer& b) {
  const bool query = a.query_dtype == b.query_dtype && a.query_stride_batch == b.query_stride_batch &&
                     a.query_stride_row == b.query_stride_row && a.query_stride_head == b.query_stride_head &&
                     a.query_stride_dim == b.query_stride_dim && is_query_aligned(a) == is_query_aligned(b);
  const bool key = a.key_dtype == b.key_dtype && a.key_rows == b.key_rows && a.key_tokens == b.key_tokens &&
                   a.key_stride_row == b.key_stride_row && a.key_stride_head == b.key_stride_head &&
                   a.key_stride_token == b.key_stride_token && a.key_stride_dim == b.key_stride_dim &&
                   is_aligned(args, a) == is_aligned(args, b);
  const bool lse =
      !a.lse == !b.lse && (!a.lse || (a.lse_stride_batch == b.lse_stride_batch &&
                                      a.lse_stride_row == b.lse_stride_row && a.lse_stride_head == b.lse_stride_head));
  const bool heads = a.num_q_heads == b.num_q_heads && a.num_kv_heads == b.num_kv_heads && a.head_dim == b.head_dim;
  const bool scale = !a.key_scale == !b.key_scale && (!a.key_scale || a.key_scale_stride == b.key_scale_stride);
  return query && key && lse && heads && scale;
}

// ---- one launch ----

struct Launch {
  std::vector<const specprefill_layer*> layers;
  ScoreParams params;
  ScoreKernel kernel;
  int blocks;
  size_t scratch_bytes;
};

ScoreKernel kernel_for(const specprefill_layer& layer, int row_tiles, int* parts, int chunks) {
  const bool half = layer.query_dtype == SPECPREFILL_F16;
  *parts = layer.query_dtype == SPECPREFILL_BF16 ? 1 : half ? 2 : 3;
  switch (layer.key_dtype) {
    case SPECPREFILL_F32: return score_kernel_for<KeysF32>(row_tiles, *parts, chunks);
    case SPECPREFILL_BF16: return score_kernel_for<KeysBf16>(row_tiles, *parts, chunks);
    case SPECPREFILL_F16:
      if (!half) return score_kernel_for<KeysSplitF16>(row_tiles, *parts, chunks);
      *parts = 1;
      return score_kernel_for<KeysF16>(row_tiles, *parts, chunks);
    default:
      if (!half) return score_kernel_for<KeysF8<false>>(row_tiles, *parts, chunks);
      *parts = 1;
      return score_kernel_for<KeysF8<true>>(row_tiles, *parts, chunks);
  }
}

void set_layout(const specprefill_score& args, const specprefill_layer& layer, ScoreParams& p) {
  const int64_t bytes = item_bytes(layer.key_dtype);
  const bool paged = args.layout == SPECPREFILL_PAGED;
  p.block_table = paged ? args.block_table : nullptr;
  p.block_table_stride = args.block_table_stride;
  p.num_blocks = layer.key_rows;
  p.block_size = paged ? static_cast<int32_t>(layer.key_tokens) : 0;
  p.cu_seqlens = args.layout == SPECPREFILL_PACKED ? args.cu_seqlens : nullptr;
  // Nobody reads more than kMaxPositions tokens.
  const int64_t table_tokens = std::min<int64_t>(std::max<int64_t>(args.block_table_width, 0), kMaxPositions);
  p.room = paged ? table_tokens * layer.key_tokens : layer.key_tokens;
  p.key_stride_row = layer.key_stride_row * bytes;
  p.key_stride_head = layer.key_stride_head * bytes;
  p.key_stride_token = layer.key_stride_token * bytes;
  p.key_stride_dim = layer.key_stride_dim * bytes;
  p.key_is_aligned = is_aligned(args, layer);
  p.key_e5m2 = layer.key_dtype == SPECPREFILL_F8_E5M2;
  p.key_row_bytes = static_cast<int32_t>(layer.head_dim * bytes);
  p.chunks = static_cast<int32_t>(ceil_div(p.key_row_bytes, kLineBytes / 2));
  p.lines = static_cast<int32_t>(ceil_div(p.key_row_bytes, kLineBytes));
}

void set_options(const specprefill_score& args, const specprefill_layer& layer, ScoreParams& p) {
  p.state = args.state;
  p.state_stride_batch = args.state_stride_batch;
  p.state_stride_row = args.state_stride_row;
  p.state_rows = static_cast<int32_t>(args.state_rows);
  p.batch = static_cast<int32_t>(args.batch);
  p.look_ahead = static_cast<int32_t>(args.look_ahead);
  p.max_len = static_cast<int32_t>(args.max_len);
  p.seq_lens = args.seq_lens;
  p.num_look_ahead = args.num_look_ahead;
  p.query_stride_batch = layer.query_stride_batch;
  p.query_stride_row = layer.query_stride_row;
  p.query_stride_head = layer.query_stride_head;
  p.query_stride_dim = layer.query_stride_dim;
  p.query_dtype = layer.query_dtype;
  p.lse_stride_batch = layer.lse_stride_batch;
  p.lse_stride_row = layer.lse_stride_row;
  p.lse_stride_head = layer.lse_stride_head;
  p.group = static_cast<int32_t>(layer.num_q_heads / layer.num_kv_heads);
  p.kv_heads = static_cast<int32_t>(layer.num_kv_heads);
  p.head_dim = static_cast<int32_t>(layer.head_dim);
  p.observation = args.queries == SPECPREFILL_OBSERVATION_WINDOW;
  p.counts_look_ahead = !p.observation && args.normalize_over == SPECPREFILL_OVER_VISIBLE;
  p.softcap = args.softcap;
  p.half = static_cast<int32_t>(std::min(args.pool_kernel_size / 2, args.max_len));
  p.pool_part = args.pool_edge == SPECPREFILL_POOL_VALID ? 0.0f : 1.0f / static_cast<float>(args.pool_kernel_size);
}

// A kernel whose queries fit the device's shared memory beside the stages.
int choose_kernel(const specprefill_layer& layer, Launch& launch) {
  ScoreParams& p = launch.params;
  int limit = 0;
  SPECPREFILL_TRY(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &limit));
  for (int row_tiles = static_cast<int>(ceil_div(p.rows.octets, 2));; row_tiles = launch.kernel.row_tiles / 2) {
    SPECPREFILL_REQUIRE(row_tiles >= 1,
                        "head_dim: expected one whose queries fit the %d bytes of shared memory that a block of this "
                        "GPU has, got %lld, which take %zu",
                        limit, ll(layer.head_dim), launch.kernel.shared_bytes);
    launch.kernel = kernel_for(layer, row_tiles, &p.query_parts, p.chunks);
    if (launch.kernel.shared_bytes <= static_cast<size_t>(limit)) break;
  }
  p.query_is_ready = layer.query_dtype != SPECPREFILL_F32 && p.query_parts == 1 && is_query_aligned(layer);
  p.query_fragments = p.chunks * static_cast<int32_t>(4 / item_bytes(layer.key_dtype));
  p.rows.blocks = static_cast<int32_t>(ceil_div(p.rows.octets, 2 * launch.kernel.row_tiles));
  return resident_blocks(launch.kernel.run, kScoreThreads, launch.kernel.shared_bytes, &launch.blocks);
}

// Work of an item, and the layers of a launch that leave its tickets countable.
int set_jobs(const specprefill_layer& layer, ScoreParams& p, int64_t* layers_at_once) {
  const int64_t readable = int64_t{p.max_len} + (p.counts_look_ahead ? p.look_ahead - 1 : 0);
  p.sum_jobs = layer.lse ? 0 : static_cast<int32_t>(ceil_div(readable, kSumKeys));
  p.pool_jobs = static_cast<int32_t>(ceil_div(p.max_len, kPoolPositions));
  const int64_t each = int64_t{p.batch} * p.kv_heads * p.rows.blocks, jobs = p.sum_jobs + p.pool_jobs;
  *layers_at_once = std::min<int64_t>(kLayersPerLaunch, kMostTickets / jobs / each);
  SPECPREFILL_REQUIRE(*layers_at_once >= 1,
                      "state: expected fewer than 2^31 pieces of work a layer, got %lld sequences of %d KV heads in "
                      "%lld pieces",
                      ll(p.batch), p.kv_heads, ll(jobs * p.rows.blocks));
  return SPECPREFILL_OK;
}

void set_layers(Launch& launch) {
  ScoreParams& p = launch.params;
  p.num_layers = static_cast<int32_t>(launch.layers.size());
  for (size_t i = 0; i < launch.layers.size(); ++i) {
    const specprefill_layer& layer = *launch.layers[i];
    if (layer.key_scale) p.key_scale_stride = layer.key_scale_stride;
    const int64_t window = layer.window == 0 ? kMaxPositions : std::min<int64_t>(layer.window, kMaxPositions);
    p.layers[i] = {layer.query, layer.key, layer.key_scale, layer.lse, layer.scale, static_cast<int32_t>(window)};
  }
  p.items = p.num_layers * p.batch * p.kv_heads * p.rows.blocks;
  p.lead = launch.blocks / 2;
  const uint32_t tickets = score_jobs(p, p.sum_jobs, p.pool_jobs).tickets;
  launch.blocks = static_cast<int>(std::min<int64_t>(launch.blocks, tickets));
  Arena count;
  Scratch(p.items, int64_t{p.items} * 16 * launch.kernel.row_tiles, p.sum_jobs, count);
  launch.scratch_bytes = count.used() + Arena::kAlign;
}

int plan(const specprefill_score& args, const specprefill_layer* layers, int64_t num_layers,
         std::vector<Launch>& launches) {
  std::vector<bool> planned(static_cast<size_t>(num_layers), false);
  for (int64_t first = 0; first < num_layers; ++first) {
    if (planned[static_cast<size_t>(first)]) continue;
    const specprefill_layer& layer = layers[first];
    Launch launch{};
    set_layout(args, layer, launch.params);
    set_options(args, layer, launch.params);
    launch.params.rows = rows_for(args.look_ahead, launch.params.group);
    SPECPREFILL_TRY(choose_kernel(layer, launch));
    int64_t at_once = 0;
    SPECPREFILL_TRY(set_jobs(layer, launch.params, &at_once));
    const Launch alone = launch;
    for (int64_t i = first; i < num_layers; ++i) {
      if (planned[static_cast<size_t>(i)] || !alike(args, layer, layers[i])) continue;
      planned[static_cast<size_t>(i)] = true;
      launch.layers.push_back(&layers[i]);
      if (static_cast<int64_t>(launch.layers.size()) == at_once) {
        set_layers(launch);
        launches.push_back(launch);
        launch = alone;
      }
    }
    if (launch.layers.empty()) continue;
    set_layers(launch);
    launches.push_back(launch);
  }
  return SPECPREFILL_OK;
}

int run(Launch& it, void* scratch, cudaStream_t stream) {
  ScoreParams& p = it.params;
  const LaunchName name("score_kernel(layers=%d, B=%d, N=%d, Hq=%d, Hkv=%d, D=%d, T=%d, dtypes %d and %d)",
                        p.num_layers, p.batch, p.look_ahead, p.group * p.kv_heads, p.kv_heads, p.head_dim, p.max_len,
                        p.query_dtype, it.layers[0]->key_dtype);
  Arena arena(scratch, it.scratch_bytes);
  const Scratch memory(p.items, int64_t{p.items} * 16 * it.kernel.row_tiles, p.sum_jobs, arena);
  p.next_ticket = memory.counters;
  p.sums_done = memory.counters + 1;
  p.norm_ready = p.sums_done + p.items;
  p.norms = memory.norms;
  p.partials = memory.partials;
  const size_t counters = (1 + 2 * static_cast<size_t>(p.items)) * sizeof(uint32_t);
  SPECPREFILL_TRY(cuda_status(cudaMemsetAsync(memory.counters, 0, counters, stream), name.text));
  return launch(name, it.kernel.run, dim3(static_cast<unsigned>(it.blocks)), kScoreThreads, it.kernel.shared_bytes,
                stream, p);
}

}  // namespace
}  // namespace specprefill

using namespace specprefill;

size_t specprefill_score_workspace_size_cuda(int64_t batch, int64_t look_ahead, int64_t num_q_heads,
                                             int64_t num_kv_heads, int64_t head_dim, int64_t max_len, int64_t layers,
                                             int64_t pool_kernel_size) {
  size_t bytes = 0;
  guarded("score_workspace_size", [&]() -> int {
    for (int64_t size : {batch, look_ahead, num_q_heads, num_kv_heads, head_dim, max_len, layers}) {
      SPECPREFILL_REQUIRE(size >= 1 && size <= kMaxSize, "sizes: expected 1 to 2^31 - 1, got %lld", ll(size));
    }
    SPECPREFILL_REQUIRE(pool_kernel_size >= 1, "pool_kernel_size: expected at least 1, got %lld", ll(pool_kernel_size));
    // Rows lie in octets; a job has an octet at least, and 16 rows for each of its octets at most. Of layers with as
    // many query heads, the one with the most KV heads has the most octets.
    int64_t octets = 0;
    const ScoreRows alone = rows_for(look_ahead, 1);
    SPECPREFILL_REQUIRE(!__builtin_mul_overflow(num_q_heads, alone.octets, &octets) &&
                            !__builtin_mul_overflow(octets, batch, &octets) &&
                            !__builtin_mul_overflow(octets, std::min<int64_t>(layers, kLayersPerLaunch), &octets) &&
                            octets < (INT64_MAX >> 5),
                        "sizes: expected what memory can hold, got %lld sequences of %lld heads", ll(batch),
                        ll(num_q_heads));
    Arena count;
    Scratch(octets, octets * 16, ceil_div(max_len + look_ahead, kSumKeys), count);
    bytes = count.used() + Arena::kAlign + Workspace::kAlign;
    return SPECPREFILL_OK;
  });
  return bytes;
}

int specprefill_score_layers_cuda(const specprefill_score* args, const specprefill_layer* layers, int64_t num_layers,
                                  void* workspace, size_t workspace_bytes, void* stream) {
  return guarded("score_layers", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_score, got a null pointer");
    SPECPREFILL_TRY(check_score_sizes(*args, layers, num_layers));
    SPECPREFILL_REQUIRE(args->max_len <= kMaxPositions - args->look_ahead,
                        "state: expected fewer than 2^30 tokens, got %lld", ll(args->max_len));
    std::vector<Launch> launches;
    SPECPREFILL_TRY(plan(*args, layers, num_layers, launches));
    size_t needed = 0;
    for (const Launch& it : launches) needed = std::max(needed, it.scratch_bytes);
    Workspace memory(workspace, workspace_bytes, needed, static_cast<cudaStream_t>(stream));
    unsigned char* scratch = nullptr;
    SPECPREFILL_TRY(memory.take(&scratch));
    for (Launch& it : launches) SPECPREFILL_TRY(run(it, scratch, static_cast<cudaStream_t>(stream)));
    return SPECPREFILL_OK;
  });
}
