// The arithmetic of the score, built once per instruction set. Bytes: each key is read once, converted and transposed
// into a panel that stays in L1; the weights of one KV head go once to memory and back (kTile at a time, so L2 serves
// it for short prompts). Operations: 2 * rows * tokens * head_dim of the product; exponentials and pooling take 20 to
// 40 % of the time at head_dim 64, less at 128.

// GCC's own AVX-512 header starts from an undefined register, and GCC warns of it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "common/simd.h"
#include "score/cpu_kernels.h"

namespace specprefill {
namespace SPECPREFILL_ISA {

constexpr int kPanel = kLanes * kVectors;
static_assert(kTile % kPanel == 0, "a tile is whole panels");

SPECPREFILL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPECPREFILL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
SPECPREFILL_INLINE bool finite(float x) { return x - x == 0.0f; }

// ---- keys: kLanes tokens become kLanes columns of a panel ----

SPECPREFILL_INLINE const char* token_address(const KeySource& keys, int64_t t) {
  if (!keys.block_table) return keys.base + t * keys.token_bytes;
  const int64_t block = keys.block_table[t / keys.block_size];
  return keys.base + block * keys.block_bytes + (t % keys.block_size) * keys.token_bytes;
}

// Up to kLanes elements from `p` on, the rest zeros; never reads beyond them.
template <class T>
SPECPREFILL_INLINE vf load_part(const char* p, int64_t count, int64_t dim_bytes) {
  typename T::stored part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) memcpy(&part[i], p + i * dim_bytes, sizeof part[i]);
  return T::load(part);
}

template <class T>
static void pack_panel(const KeySource& keys, int64_t first, int64_t count, float* panel) {
  const int64_t head_dim = keys.head_dim;
  const bool contiguous = keys.dim_bytes == (int64_t)sizeof(typename T::stored);
  for (int v = 0; v < kVectors; ++v) {
    const char* token[kLanes];
    const int64_t here = smaller(larger(count - v * kLanes, 0), kLanes);
    for (int64_t i = 0; i < here; ++i) token[i] = token_address(keys, first + v * kLanes + i);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const int64_t dims = smaller(head_dim - d, kLanes);
      vf rows[kLanes];
      if (here == kLanes && dims == kLanes && contiguous) {
        for (int i = 0; i < kLanes; ++i) rows[i] = T::load(token[i] + d * (int64_t)sizeof(typename T::stored));
      } else {
        for (int64_t i = 0; i < kLanes; ++i) {
          rows[i] = i < here ? load_part<T>(token[i] + d * keys.dim_bytes, dims, keys.dim_bytes) : vf{};
        }
      }
      transpose(rows);
      for (int64_t i = 0; i < dims; ++i) store(panel + (d + i) * kPanel + v * kLanes, rows[i]);
    }
  }
}

static void pack_panel(const KeySource& keys, int64_t first, int64_t count, float* panel) {
  switch (keys.dtype) {
    case SPECPREFILL_F32: return pack_panel<F32>(keys, first, count, panel);
    case SPECPREFILL_F16: return pack_panel<F16>(keys, first, count, panel);
    case SPECPREFILL_BF16: return pack_panel<BF16>(keys, first, count, panel);
    case SPECPREFILL_F8_E4M3FN: return pack_panel<F8E4M3FN>(keys, first, count, panel);
    default: return pack_panel<F8E5M2>(keys, first, count, panel);
  }
}

// ---- products: kRows query rows by one panel, accumulated in registers over head_dim ----

static void multiply(const float* query, const float* panel, int64_t head_dim, int64_t rows, float* out,
                     int64_t stride) {
  vf sum[kRows][kVectors] = {};
  for (int64_t d = 0; d < head_dim; ++d) {
    vf key[kVectors];
    for (int v = 0; v < kVectors; ++v) key[v] = load(panel + d * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const vf q = splat(query[d * kRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(q, key[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    if (r < rows) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(out + r * stride + v * kLanes, sum[r][v]);
    }
  }
}

// ---- exponentials of one row of a tile ----

// Lanes j with low <= i + j < high are kept, the others become `otherwise`.
SPECPREFILL_INLINE vf keep_within(vf x, int64_t i, int64_t low, int64_t high, vf otherwise) {
  vi lane;
  for (int j = 0; j < kLanes; ++j) lane[j] = j;
  const vi at = lane + (int32_t)i;
  return ((at >= (int32_t)low) & (at < (int32_t)high)) ? x : otherwise;
}

constexpr int kUnroll = 4;  // independent maxima and sums, so that one need not wait for another
static_assert(kTile % (kUnroll * kLanes) == 0, "a tile is whole unrolled steps");

SPECPREFILL_INLINE int64_t steps_end(int64_t count) {
  constexpr int64_t step = kUnroll * kLanes;
  return (count + step - 1) / step * step;
}

// The row's scores, soft-capped and masked, back to x; their maximum. NaN passes unseen.
template <bool kMasked>
static float maximum_of(float* x, int64_t stop, int64_t low, int64_t high, float softcap) {
  const vf nothing = splat(-__builtin_inff());
  vf best[kUnroll] = {nothing, nothing, nothing, nothing};
  for (int64_t i = 0; i < stop; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      float* p = x + i + u * kLanes;
      vf s = load(p);
      if (softcap != 0.0f) s = splat(softcap) * tanh(s);
      if (kMasked) s = keep_within(s, i + u * kLanes, low, high, nothing);
      if (kMasked || softcap != 0.0f) store(p, s);
      best[u] = max(best[u], s);
    }
  }
  return horizontal_max(max(max(best[0], best[1]), max(best[2], best[3])));
}

// 2^(x - shift), back to x; their sum.
template <bool kMasked>
static float exponentials(float* x, int64_t stop, int64_t low, int64_t high, float shift) {
  vf sum[kUnroll] = {};
  for (int64_t i = 0; i < stop; i += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      float* p = x + i + u * kLanes;
      vf e = exp2(load(p) - splat(shift));
      if (kMasked) e = keep_within(e, i + u * kLanes, low, high, vf{});
      sum[u] += e;
      store(p, e);
    }
  }
  return horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static bool has_nan(const float* x, int64_t low, int64_t high) {
  for (int64_t i = low; i < high; ++i) {
    if (x[i] != x[i]) return true;
  }
  return false;
}

static void exponentiate(const ScoreTile& tile, int64_t row, float* x, float* maximum, float* sum) {
  const int64_t low = larger(tile.begin[row] - tile.first, 0);
  const int64_t high = smaller(tile.end[row] - tile.first, tile.count);
  const int64_t stop = steps_end(tile.count);
  const bool masked = low > 0 || high < stop;
  float shift = -__builtin_inff();
  if (low < high && (!tile.lse || tile.softcap != 0.0f)) {
    shift = masked ? maximum_of<true>(x, stop, low, high, tile.softcap)
                   : maximum_of<false>(x, stop, low, high, tile.softcap);
    if (shift == -__builtin_inff() && has_nan(x, low, high)) shift = __builtin_inff();  // so that `combine` sees it
  }
  if (tile.lse) shift = tile.lse[row];
  *maximum = shift;
  if (low >= high || (!tile.lse && shift == -__builtin_inff())) {  // sees nothing here
    for (int64_t i = 0; i < stop; i += kLanes) store(x + i, vf{});
    *sum = 0;
    return;
  }
  *sum = masked ? exponentials<true>(x, stop, low, high, shift) : exponentials<false>(x, stop, low, high, shift);
}

static void score_tile(const ScoreTile& tile) {
  bool seen = false;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    seen |= larger(tile.begin[row], tile.first) < smaller(tile.end[row], tile.first + tile.count);
  }
  float* weights = tile.weights + tile.first;
  for (int64_t i = 0; seen && i < tile.count; i += kPanel) {  // what lies behind is masked below, whatever it is
    pack_panel(tile.keys, tile.first + i, smaller(tile.count - i, kPanel), tile.panel);
    for (int64_t row = 0; row < tile.num_rows; row += kRows) {
      float* out = weights + row * tile.stride + i;
      multiply(tile.query + row * tile.keys.head_dim, tile.panel, tile.keys.head_dim, tile.num_rows - row, out,
               tile.stride);
    }
  }
  const int64_t index = tile.first / kTile;
  for (int64_t row = 0; row < tile.num_rows; ++row) {
    const int64_t at = row * tile.stats_stride + index;
    exponentiate(tile, row, weights + row * tile.stride, tile.maxima + at, tile.sums + at);
  }
}

// ---- the softmax's denominator, over the tiles of a row ----

static bool combine(float* maxima, const float* sums, int64_t num_tiles) {
  vf best = splat(-__builtin_inff());
  for (int64_t i = 0; i < num_tiles; i += kLanes) best = max(best, load(maxima + i));
  const float maximum = horizontal_max(best);
  vf total = {};
  const bool nothing = maximum == -__builtin_inff();
  for (int64_t i = 0; i < num_tiles; i += kLanes) {
    const vf factor = nothing ? vf{} : exp2(load(maxima + i) - splat(maximum));
    total += factor * load(sums + i);
    store(maxima + i, factor);
  }
  const float sum = horizontal_sum(total);
  if (nothing) return sum == 0.0f;
  if (!finite(sum) || !finite(maximum)) return false;
  for (int64_t i = 0; i < num_tiles; i += kLanes) store(maxima + i, load(maxima + i) / splat(sum));
  return true;
}

// ---- pooling ----

// sums[i] = x[i] + ... + x[i + width - 1], from sums over 1, 2, 4, ... neighbours: log2(width) additions per element,
// in an order that does not depend on where the tile begins. Destroys x.
static void window_sums(float* x, int64_t count, int64_t width, float* sums) {
  int64_t offset = 0, have = count + width - 1;
  for (int64_t power = 1; power <= width; power *= 2) {
    if (width & power) {
      for (int64_t i = 0; i < count; i += kLanes) {
        const vf part = load(x + offset + i);
        store(sums + i, offset == 0 ? part : load(sums + i) + part);
      }
      offset += power;
    }
    if (power * 2 <= width) {
      have -= power;
      for (int64_t i = 0; i < have; i += kLanes) store(x + i, load(x + i) + load(x + i + power));
    }
  }
}

// The same for the paper's width, whose 13 loads cost less than passes over memory.
static void window_sums_13(const float* x, int64_t count, float* sums) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const float* p = x + i;
    const vf a = (load(p) + load(p + 1)) + (load(p + 2) + load(p + 3));
    const vf b = (load(p + 4) + load(p + 5)) + (load(p + 6) + load(p + 7));
    const vf c = (load(p + 8) + load(p + 9)) + (load(p + 10) + load(p + 11));
    store(sums + i, (a + b) + (c + load(p + 12)));
  }
}

// The probabilities of tokens [from, from + wanted), zero outside the prompt, and a vector of zeros behind.
static void probabilities(const PoolRow& row, int64_t from, int64_t wanted, float* x) {
  const int64_t start = larger(from, 0), stop = smaller(from + wanted, row.length);
  for (int64_t i = 0; i < start - from; ++i) x[i] = 0;
  for (int64_t t = start; t < stop;) {
    const int64_t tile = t / kTile, next = smaller((tile + 1) * kTile, stop);
    const vf factor = splat(row.factors[tile]);
    // The last vector may run past `next`: what it writes there is overwritten by the next tile, or by zeros below.
    for (int64_t i = t; i < next; i += kLanes) store(x + (i - from), load(row.weights + i) * factor);
    t = next;
  }
  for (int64_t i = stop - from; i < wanted + 16; ++i) x[i] = 0;
}

static void pool_max(const PoolRow& row, float* best) {
  float* x = row.window;
  probabilities(row, row.first - row.width / 2, row.count + row.width - 1, x);
  const float* sums = row.width == 1 ? x : row.sums;
  if (row.width == 13) {
    window_sums_13(x, row.count, row.sums);
  } else if (row.width > 1) {
    window_sums(x, row.count, row.width, row.sums);
  }
  for (int64_t i = 0; i < row.count; i += kLanes) store(best + i, max(load(best + i), load(sums + i)));
}

static void fold(const float* best, float* state, int64_t first, int64_t count, int64_t length, int64_t width,
                 float divisor) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t t = first + i;
    const int64_t inside = smaller(t + half, length - 1) - larger(t - half, 0) + 1;
    const float pooled = best[i] / (divisor != 0.0f ? divisor : (float)inside);
    state[i] = pooled > state[i] ? pooled : state[i];
  }
}

static void exp2_array(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(y + i, exp2(load(x + i)));
}

#define SPECPREFILL_QUOTE_(x) #x
#define SPECPREFILL_QUOTE(x) SPECPREFILL_QUOTE_(x)

extern const ScoreKernels score_kernels;
const ScoreKernels score_kernels = {
    SPECPREFILL_QUOTE(SPECPREFILL_ISA), kRows, kPanel, score_tile, combine, pool_max, fold, exp2_array};

}  // namespace SPECPREFILL_ISA
}  // namespace specprefill
