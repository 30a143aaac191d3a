// The C interface for Python: addresses come in as integers, failures go out as exceptions. Nothing else happens here.
// Each argument struct is a class, so that the CPU and the CUDA functions take the same ones.
#include "bindings.h"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "common/scratch.h"
#include "score/cpu_kernels.h"

namespace py = pybind11;

namespace {

using Strides2 = std::array<int64_t, 2>;
using Strides3 = std::array<int64_t, 3>;
using Strides4 = std::array<int64_t, 4>;

specprefill_layer make_layer(uintptr_t query, int32_t query_dtype, const Strides4& query_strides, uintptr_t key,
                             int32_t key_dtype, int64_t key_rows, int64_t key_tokens, const Strides4& key_strides,
                             uintptr_t key_scale, int64_t key_scale_stride, uintptr_t lse, const Strides3& lse_strides,
                             const Strides3& heads, int64_t window, float scale) {
  specprefill_layer result{};
  result.query = pointer<void>(query);
  result.query_dtype = query_dtype;
  result.query_stride_batch = query_strides[0];
  result.query_stride_row = query_strides[1];
  result.query_stride_head = query_strides[2];
  result.query_stride_dim = query_strides[3];
  result.key = pointer<void>(key);
  result.key_dtype = key_dtype;
  result.key_rows = key_rows;
  result.key_tokens = key_tokens;
  result.key_stride_row = key_strides[0];
  result.key_stride_head = key_strides[1];
  result.key_stride_token = key_strides[2];
  result.key_stride_dim = key_strides[3];
  result.key_scale = pointer<float>(key_scale);
  result.key_scale_stride = key_scale_stride;
  result.lse = pointer<float>(lse);
  result.lse_stride_batch = lse_strides[0];
  result.lse_stride_row = lse_strides[1];
  result.lse_stride_head = lse_strides[2];
  result.num_q_heads = heads[0];
  result.num_kv_heads = heads[1];
  result.head_dim = heads[2];
  result.window = window;
  result.scale = scale;
  return result;
}

specprefill_score make_score(uintptr_t state, const Strides2& state_strides, int64_t state_rows, const Strides3& sizes,
                             int32_t layout, uintptr_t seq_lens, uintptr_t cu_seqlens, uintptr_t block_table,
                             const Strides2& block_table_shape, uintptr_t num_look_ahead, int32_t queries,
                             int32_t normalize_over, int32_t pool_edge, int64_t pool_kernel_size, float softcap) {
  specprefill_score args{};
  args.state = pointer<float>(state);
  args.state_stride_batch = state_strides[0];
  args.state_stride_row = state_strides[1];
  args.state_rows = state_rows;
  args.batch = sizes[0];
  args.look_ahead = sizes[1];
  args.max_len = sizes[2];
  args.layout = layout;
  args.seq_lens = pointer<int32_t>(seq_lens);
  args.cu_seqlens = pointer<int32_t>(cu_seqlens);
  args.block_table = pointer<int32_t>(block_table);
  args.block_table_stride = block_table_shape[0];
  args.block_table_width = block_table_shape[1];
  args.num_look_ahead = pointer<int32_t>(num_look_ahead);
  args.queries = queries;
  args.normalize_over = normalize_over;
  args.pool_edge = pool_edge;
  args.pool_kernel_size = pool_kernel_size;
  args.softcap = softcap;
  return args;
}

specprefill_finalize make_finalize(uintptr_t state, const Strides3& strides, const Strides3& sizes, uintptr_t seq_lens,
                                   uintptr_t num_look_ahead, int32_t reduce, int32_t pool_edge,
                                   int64_t pool_kernel_size, uintptr_t importance) {
  return {pointer<float>(state),
          strides[0],
          strides[1],
          strides[2],
          sizes[0],
          sizes[1],
          sizes[2],
          pointer<int32_t>(seq_lens),
          pointer<int32_t>(num_look_ahead),
          reduce,
          pool_edge,
          pool_kernel_size,
          pointer<float>(importance)};
}

specprefill_select make_select(uintptr_t importance, const Strides2& strides, const Strides2& sizes, uintptr_t seq_lens,
                               uintptr_t protect, const Strides2& protect_strides, int32_t budget, double keep,
                               int64_t chunk_size, int32_t rounding, int64_t sink, int64_t tail, uintptr_t indices,
                               int64_t width, uintptr_t num_kept, uintptr_t overflow) {
  return {pointer<float>(importance),
          strides[0],
          strides[1],
          sizes[0],
          sizes[1],
          pointer<int32_t>(seq_lens),
          pointer<uint8_t>(protect),
          protect_strides[0],
          protect_strides[1],
          budget,
          keep,
          chunk_size,
          rounding,
          sink,
          tail,
          pointer<int32_t>(indices),
          width,
          pointer<int32_t>(num_kept),
          pointer<uint8_t>(overflow)};
}

// x's sizes and strides around its token dimensions; at most SPECPREFILL_MAX_DIMS on each side.
int32_t copy_dims(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, int64_t* to_sizes,
                  int64_t* to_strides) {
  if (sizes.size() > SPECPREFILL_MAX_DIMS || sizes.size() != strides.size()) {
    throw py::value_error("x: expected at most " + std::to_string(SPECPREFILL_MAX_DIMS) +
                          " dimensions on each side of the tokens, got " + std::to_string(sizes.size()));
  }
  std::copy(sizes.begin(), sizes.end(), to_sizes);
  std::copy(strides.begin(), strides.end(), to_strides);
  return static_cast<int32_t>(sizes.size());
}

specprefill_gather_tokens make_gather_tokens(uintptr_t x, int64_t item_bytes, const Strides2& sizes,
                                             const Strides2& strides, const std::vector<int64_t>& outer_sizes,
                                             const std::vector<int64_t>& outer_strides,
                                             const std::vector<int64_t>& inner_sizes,
                                             const std::vector<int64_t>& inner_strides, uintptr_t cu_seqlens,
                                             uintptr_t indices, int64_t indices_stride, int64_t width,
                                             uintptr_t num_kept, uintptr_t values, uintptr_t position_ids,
                                             uintptr_t offsets) {
  specprefill_gather_tokens args{};
  args.x = pointer<void>(x);
  args.item_bytes = item_bytes;
  args.batch = sizes[0];
  args.tokens = sizes[1];
  args.stride_batch = strides[0];
  args.stride_token = strides[1];
  args.num_outer = copy_dims(outer_sizes, outer_strides, args.outer_sizes, args.outer_strides);
  args.num_inner = copy_dims(inner_sizes, inner_strides, args.inner_sizes, args.inner_strides);
  args.cu_seqlens = pointer<int32_t>(cu_seqlens);
  args.indices = pointer<int32_t>(indices);
  args.indices_stride = indices_stride;
  args.width = width;
  args.num_kept = pointer<int32_t>(num_kept);
  args.values = pointer<void>(values);
  args.position_ids = pointer<int64_t>(position_ids);
  args.offsets = pointer<int32_t>(offsets);
  return args;
}

// shape: rows, tokens, heads, head_dim; strides: row, head, token, dim.
specprefill_cache make_cache(uintptr_t data, int64_t item_bytes, const Strides4& shape, const Strides4& strides) {
  return {pointer<void>(data), item_bytes, shape[0],   shape[1],  shape[2], shape[3],
          strides[0],          strides[1], strides[2], strides[3]};
}

specprefill_gather_kv make_gather_kv(const specprefill_cache& source, const specprefill_cache& target, int32_t layout,
                                     int64_t batch, uintptr_t cu_seqlens, uintptr_t block_table,
                                     const Strides2& block_table_shape, uintptr_t target_block_table,
                                     const Strides2& target_block_table_shape, uintptr_t indices,
                                     int64_t indices_stride, int64_t width, uintptr_t num_kept) {
  return {source,
          target,
          layout,
          batch,
          pointer<int32_t>(cu_seqlens),
          pointer<int32_t>(block_table),
          block_table_shape[0],
          block_table_shape[1],
          pointer<int32_t>(target_block_table),
          target_block_table_shape[0],
          target_block_table_shape[1],
          pointer<int32_t>(indices),
          indices_stride,
          width,
          pointer<int32_t>(num_kept)};
}

// 2^x by the vector code that the score uses, so that a test can hold it to its error bound.
std::vector<float> exp2_array(std::vector<float> x) {
  const size_t count = x.size();
  x.resize((count + 15) / 16 * 16);
  std::vector<float> y(x.size());
  specprefill::score_kernels().exp2(x.data(), y.data(), static_cast<int64_t>(x.size()));
  y.resize(count);
  return y;
}

// Local to this module: the emulation of the CUDA kernels is a second one with the same classes.
template <class T, class F>
void bind_struct(py::module_& m, const char* name, F make) {
  py::class_<T>(m, name, py::module_local()).def(py::init(make));
}

void bind_cpu(py::module_& m) {
  m.def("score_workspace_size", &specprefill_score_workspace_size);
  m.def("score_layers", [](const specprefill_score& args, const std::vector<specprefill_layer>& layers,
                           uintptr_t workspace, size_t workspace_bytes, int num_threads) {
    run([&] {
      return specprefill_score_layers_cpu(&args, layers.data(), static_cast<int64_t>(layers.size()),
                                          pointer<void>(workspace), workspace_bytes, num_threads);
    });
  });
  m.def("finalize", [](const specprefill_finalize& args, int num_threads) {
    run([&] { return specprefill_finalize_cpu(&args, num_threads); });
  });
  m.def("select", [](const specprefill_select& args, int num_threads) {
    run([&] { return specprefill_select_cpu(&args, num_threads); });
  });
  m.def("gather_tokens", [](const specprefill_gather_tokens& args, int num_threads) {
    run([&] { return specprefill_gather_tokens_cpu(&args, num_threads); });
  });
  m.def("select_tokens", [](const specprefill_finalize& finalize, const specprefill_select& select,
                            const specprefill_gather_tokens& gather, int num_threads) {
    run([&] { return specprefill_select_tokens_cpu(&finalize, &select, &gather, num_threads); });
  });
  m.def("gather_kv", [](const std::vector<specprefill_gather_kv>& caches, int num_threads) {
    for (const auto& args : caches) run([&] { return specprefill_gather_kv_cpu(&args, num_threads); });
  });
}

}  // namespace

PYBIND11_MODULE(SPECPREFILL_MODULE, m) {
  m.doc() = "The compiled kernels of specprefill_kernels. Addresses are integers; see specprefill.h.";
  m.def("version", [] { return SPECPREFILL_VERSION; });
  m.def("instruction_set", &specprefill_instruction_set);
  m.def("exp2", &exp2_array);
  m.def("prefer_huge_pages",
        [](uintptr_t data, size_t bytes) { specprefill::prefer_huge_pages(pointer<void>(data), bytes); });
  bind_struct<specprefill_layer>(m, "Layer", &make_layer);
  bind_struct<specprefill_score>(m, "Score", &make_score);
  bind_struct<specprefill_finalize>(m, "Finalize", &make_finalize);
  bind_struct<specprefill_select>(m, "Select", &make_select);
  bind_struct<specprefill_gather_tokens>(m, "GatherTokens", &make_gather_tokens);
  bind_struct<specprefill_cache>(m, "Cache", &make_cache);
  bind_struct<specprefill_gather_kv>(m, "GatherKv", &make_gather_kv);
  bind_cpu(m);
#if defined(SPECPREFILL_HAVE_CUDA)
  bind_cuda(m);
#endif
}
