#include "score/check.h"

#include <cmath>

#include "common/dtype.h"
#include "common/guarded.h"
#include "common/sequences.h"
#include "common/status.h"

namespace specprefill {
namespace {

long long ll(int64_t x) { return static_cast<long long>(x); }

// Tokens that the key buffer holds for sequence b.
int64_t room_for(const specprefill_score& args, const specprefill_layer& layer, int64_t b) {
  if (args.layout == SPECPREFILL_PACKED) return args.cu_seqlens[b + 1] - args.cu_seqlens[b];
  // Nobody reads more than kMaxSize tokens, so a larger room need not be known.
  if (args.layout == SPECPREFILL_PAGED) {
    if (args.block_table_width < 1) return 0;
    return args.block_table_width > kMaxSize / layer.key_tokens ? kMaxSize : args.block_table_width * layer.key_tokens;
  }
  return layer.key_tokens;
}

int check_options(const specprefill_score& args) {
  SPECPREFILL_REQUIRE(args.state, "state: expected memory, got a null pointer");
  SPECPREFILL_REQUIRE(args.batch >= 1 && args.look_ahead >= 1 && args.max_len >= 1,
                      "state: expected no empty dimension [B, N, T], got [%lld, %lld, %lld]", ll(args.batch),
                      ll(args.look_ahead), ll(args.max_len));
  SPECPREFILL_REQUIRE(
      args.batch <= kMaxSize && args.look_ahead <= kMaxSize && args.max_len <= kMaxSize - args.look_ahead,
      "state: expected dimensions below 2^31, got [%lld, %lld, %lld]", ll(args.batch), ll(args.look_ahead),
      ll(args.max_len));
  SPECPREFILL_REQUIRE(args.state_rows == args.look_ahead || args.state_rows == 1,
                      "state: expected %lld rows or 1, got %lld", ll(args.look_ahead), ll(args.state_rows));
  SPECPREFILL_TRY(check_enum("layout", args.layout, SPECPREFILL_PAGED));
  SPECPREFILL_REQUIRE(args.pool_kernel_size >= 1 && args.pool_kernel_size % 2 == 1,
                      "pool_kernel_size: expected an odd number (a centred window), got %lld",
                      ll(args.pool_kernel_size));
  SPECPREFILL_REQUIRE(args.softcap == 0 || (args.softcap > 0 && std::isnormal(args.softcap)),
                      "softcap: expected a number above 0 that fp32 can hold, or 0 for none, got %g",
                      static_cast<double>(args.softcap));
  SPECPREFILL_TRY(check_enum("queries", args.queries, SPECPREFILL_OBSERVATION_WINDOW));
  SPECPREFILL_TRY(check_enum("normalize_over", args.normalize_over, SPECPREFILL_OVER_VISIBLE));
  SPECPREFILL_TRY(check_enum("pool_edge", args.pool_edge, SPECPREFILL_POOL_VALID));
  if (args.layout == SPECPREFILL_PAGED) {
    SPECPREFILL_REQUIRE(args.block_table && args.seq_lens,
                        "block_table and seq_lens: expected with paged keys, got none");
  }
  SPECPREFILL_REQUIRE(args.layout != SPECPREFILL_PACKED || args.cu_seqlens,
                      "cu_seqlens: expected a tensor with the packed layout, got none");
  return SPECPREFILL_OK;
}

int check_layer(const specprefill_score& args, const specprefill_layer& layer, int64_t index) {
  SPECPREFILL_REQUIRE(layer.query && layer.key, "layer %lld: expected query and key, got a null pointer", ll(index));
  SPECPREFILL_REQUIRE(layer.query_dtype >= SPECPREFILL_F32 && layer.query_dtype <= SPECPREFILL_BF16,
                      "query of layer %lld: expected F32, F16 or BF16, got dtype %d", ll(index), layer.query_dtype);
  SPECPREFILL_REQUIRE(is_dtype(layer.key_dtype), "key of layer %lld: expected a specprefill_dtype, got %d", ll(index),
                      layer.key_dtype);
  SPECPREFILL_REQUIRE(layer.head_dim >= 1 && layer.num_kv_heads >= 1 && layer.num_q_heads >= 1 &&
                          layer.num_q_heads % layer.num_kv_heads == 0,
                      "query of layer %lld: expected a number of heads that is a multiple of key's %lld, got %lld",
                      ll(index), ll(layer.num_kv_heads), ll(layer.num_q_heads));
  SPECPREFILL_REQUIRE(layer.head_dim <= kMaxSize && layer.num_q_heads <= kMaxSize && layer.key_tokens <= kMaxSize,
                      "key of layer %lld: expected dimensions below 2^31, got %lld tokens, %lld heads of %lld",
                      ll(index), ll(layer.key_tokens), ll(layer.num_q_heads), ll(layer.head_dim));
  SPECPREFILL_REQUIRE(layer.window >= 0, "window of layer %lld: expected at least 1, got %lld", ll(index),
                      ll(layer.window));
  SPECPREFILL_REQUIRE(std::isfinite(layer.scale), "scale of layer %lld: expected a finite number, got %g", ll(index),
                      static_cast<double>(layer.scale));
  const int64_t rows_needed = args.layout == SPECPREFILL_DENSE ? args.batch : 1;
  SPECPREFILL_REQUIRE(layer.key_rows >= rows_needed && layer.key_tokens >= 1,
                      "key of layer %lld: expected %lld sequences with tokens, got %lld rows of %lld", ll(index),
                      ll(rows_needed), ll(layer.key_rows), ll(layer.key_tokens));
  return SPECPREFILL_OK;
}

// Lengths, blocks and lse, against the buffers of one layer.
int check_contents(const specprefill_score& args, const specprefill_layer& layer) {
  if (args.layout == SPECPREFILL_PACKED) {
    SPECPREFILL_TRY(check_cu_seqlens(args.cu_seqlens, args.batch, layer.key_tokens));
  }
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t extra = readable_length(args, b) - prompt_length(args, b);
    const int64_t room = room_for(args, layer, b) - extra, limit = room < args.max_len ? room : args.max_len;
    const int64_t length = prompt_length(args, b);
    SPECPREFILL_REQUIRE(length >= 1 && length <= limit, "seq_lens[%lld]: expected 1 <= length <= %lld%s, got %lld",
                        ll(b), ll(limit), extra ? " (the look-ahead keys must follow the prompt)" : "", ll(length));
    SPECPREFILL_REQUIRE(
        args.queries != SPECPREFILL_OBSERVATION_WINDOW || rows_of(args, b) <= length,
        "num_look_ahead[%lld]: expected at most the prompt's %lld tokens, as an observation window, got %lld", ll(b),
        ll(length), ll(rows_of(args, b)));
    if (args.layout == SPECPREFILL_PAGED) {
      SPECPREFILL_TRY(check_blocks("block_table", args.block_table, args.block_table_stride, b, length + extra,
                                   layer.key_tokens, layer.key_rows));
    }
    for (int64_t n = 0; layer.lse && n < rows_of(args, b); ++n) {
      for (int64_t h = 0; h < layer.num_q_heads; ++h) {
        const float lse = layer.lse[b * layer.lse_stride_batch + n * layer.lse_stride_row + h * layer.lse_stride_head];
        // -Inf is the sum of a row that sees no key; where the row sees one, its weights will be found not finite.
        SPECPREFILL_REQUIRE(lse < INFINITY, "lse[%lld, %lld, %lld]: expected a finite value, got %g", ll(b), ll(n),
                            ll(h), static_cast<double>(lse));
      }
    }
  }
  return SPECPREFILL_OK;
}

}  // namespace

int64_t rows_of(const specprefill_score& args, int64_t b) { return length_of(args.num_look_ahead, b, args.look_ahead); }

int64_t prompt_length(const specprefill_score& args, int64_t b) {
  if (args.seq_lens) return args.seq_lens[b];
  if (args.layout == SPECPREFILL_PACKED) return args.cu_seqlens[b + 1] - args.cu_seqlens[b];
  return args.max_len;
}

int64_t readable_length(const specprefill_score& args, int64_t b) {
  const bool extra = args.queries == SPECPREFILL_LOOK_AHEAD && args.normalize_over == SPECPREFILL_OVER_VISIBLE;
  return prompt_length(args, b) + (extra ? rows_of(args, b) - 1 : 0);
}

int check_score_sizes(const specprefill_score& args, const specprefill_layer* layers, int64_t num_layers) {
  SPECPREFILL_TRY(check_options(args));
  SPECPREFILL_REQUIRE(layers && num_layers >= 1, "layers: expected at least one, got %lld", ll(num_layers));
  for (int64_t i = 0; i < num_layers; ++i) SPECPREFILL_TRY(check_layer(args, layers[i], i));
  return SPECPREFILL_OK;
}

int check_score(const specprefill_score& args, const specprefill_layer* layers, int64_t num_layers) {
  SPECPREFILL_TRY(check_score_sizes(args, layers, num_layers));
  SPECPREFILL_TRY(check_lengths("num_look_ahead", args.num_look_ahead, args.batch, args.look_ahead));
  for (int64_t i = 0; i < num_layers; ++i) SPECPREFILL_TRY(check_contents(args, layers[i]));
  return SPECPREFILL_OK;
}

}  // namespace specprefill
