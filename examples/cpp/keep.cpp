// What a prompt's look-ahead queries find important, in C++: score one layer, finalize, select.
#include <specprefill.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t rows = 4, q_heads = 8, kv_heads = 2, dim = 64, tokens = 1000;
constexpr std::int64_t needle = 700;  // the look-ahead queries look here

// Every call of the C interface that can fail says why: as an exception here.
void check(int status) {
  if (status != SPECPREFILL_OK) throw std::runtime_error(specprefill_last_error());
}

std::vector<float> random_values(std::int64_t count) {
  static std::mt19937 engine(0);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

// query [1, rows, q_heads, dim], key [1, kv_heads, tokens, dim] -> importance [1, tokens]
std::vector<float> score(const std::vector<float>& query, const std::vector<float>& key, int threads) {
  std::vector<float> state(rows * tokens), importance(tokens);

  specprefill_layer layer{};  // zeros are "none" wherever a field may be left out
  layer.query = query.data();
  layer.query_dtype = layer.key_dtype = SPECPREFILL_F32;
  layer.query_stride_batch = rows * q_heads * dim;
  layer.query_stride_row = q_heads * dim;
  layer.query_stride_head = dim;
  layer.query_stride_dim = layer.key_stride_dim = 1;
  layer.key = key.data();
  layer.key_rows = 1;
  layer.key_tokens = tokens;
  layer.key_stride_row = kv_heads * tokens * dim;
  layer.key_stride_head = tokens * dim;
  layer.key_stride_token = dim;
  layer.num_q_heads = q_heads;
  layer.num_kv_heads = kv_heads;
  layer.head_dim = dim;
  layer.scale = 0.125f;  // 1 / sqrt(dim)

  specprefill_score args{};
  args.state = state.data();
  args.state_stride_batch = rows * tokens;
  args.state_stride_row = tokens;
  args.state_rows = args.look_ahead = rows;
  args.batch = 1;
  args.max_len = tokens;
  args.layout = SPECPREFILL_DENSE;
  args.pool_kernel_size = 13;
  check(specprefill_score_layers_cpu(&args, &layer, 1, nullptr, 0, threads));

  specprefill_finalize finalize{};
  finalize.state = state.data();
  finalize.state_stride_batch = rows * tokens;
  finalize.state_stride_row = tokens;
  finalize.state_stride_token = 1;
  finalize.batch = 1;
  finalize.look_ahead = rows;
  finalize.max_len = tokens;
  finalize.pool_kernel_size = 1;  // pooled before the maximum
  finalize.importance = importance.data();
  check(specprefill_finalize_cpu(&finalize, threads));
  return importance;
}

std::vector<std::int32_t> select(const std::vector<float>& importance, double keep_ratio, int threads) {
  specprefill_select args{};
  args.importance = importance.data();
  args.importance_stride_batch = tokens;
  args.importance_stride_token = 1;
  args.batch = 1;
  args.max_len = tokens;
  args.budget = SPECPREFILL_KEEP_RATIO;
  args.keep = keep_ratio;
  args.chunk_size = 32;
  args.width = specprefill_select_width(&args);
  if (args.width < 0) throw std::runtime_error(specprefill_last_error());

  std::vector<std::int32_t> indices(static_cast<std::size_t>(args.width));
  std::int32_t num_kept = 0;
  std::uint8_t overflow = 0;
  args.indices = indices.data();
  args.num_kept = &num_kept;
  args.overflow = &overflow;
  check(specprefill_select_cpu(&args, threads));
  indices.resize(static_cast<std::size_t>(num_kept));
  return indices;
}

double parse_ratio(const std::string& text) {
  std::size_t used = 0;
  try {
    const double ratio = std::stod(text, &used);  // whether it is a fraction is for the library to say
    if (used == text.size()) return ratio;
  } catch (const std::exception&) {
  }
  throw std::invalid_argument("keep_ratio: expected a number, got '" + text + "'");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const double keep_ratio = argc > 1 ? parse_ratio(argv[1]) : 0.2;
    const std::vector<float> query = random_values(rows * q_heads * dim);
    std::vector<float> key = random_values(kv_heads * tokens * dim);
    for (std::int64_t d = 0; d < dim; ++d) key[needle * dim + d] = query[d];  // head 0's own query, in row 0

    const std::vector<std::int32_t> kept = select(score(query, key, 2), keep_ratio, 2);
    bool found = false;
    for (const std::int32_t position : kept) found |= position == needle;
    std::printf("kept %zu of %lld tokens; token %lld is %s\n", kept.size(), static_cast<long long>(tokens),
                static_cast<long long>(needle), found ? "among them" : "NOT among them");
    return found ? 0 : 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "keep: %s\n", error.what());
    return 2;
  }
}
