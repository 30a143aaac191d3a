// Products and exponentials of the score, built once per instruction set.
//
// Bytes: each key is read once, in order, and widened to fp32 into a panel that stays in L1; the weights of one KV head
// go once to memory and back. Operations: 2 * rows * tokens * head_dim of the product, as multiply-adds of a vector of
// rows by one element of a key; an exponential per row and token costs as much as some 20 of them.
//
// bf16 keys are widened too: AVX512-BF16's dot product, which would take them as they are, does 32 multiply-adds, but
// at 0.93 G instructions/s on a core of Intel's fifth Xeon generation, where an FMA of 16 comes at 4.1 G/s.

// GCC's own AVX-512 header starts from an undefined register, and GCC warns of it.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "common/simd.h"
#include "score/cpu_kernels.h"
#include "score/pool_simd.h"

namespace specprefill {
namespace SPECPREFILL_ISA {

constexpr int kPanel = kSums;  // keys that are widened at a time
static_assert(kTile % kPanel == 0, "a tile is whole panels");

SPECPREFILL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPECPREFILL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- keys: a panel is [head_dim / kLanes, kPanel, kLanes] floats ----

// Where `count` tokens from `first` on lie; nullptr for those that may not be read.
static void locate(const KeySource& keys, int64_t first, int64_t count, const char* (&token)[kPanel]) {
  const int64_t here = smaller(count, keys.tokens - first);
  for (int64_t i = larger(here, 0); i < kPanel; ++i) token[i] = nullptr;
  if (!keys.block_table) {
    const char* p = keys.base + first * keys.token_bytes;
    for (int64_t i = 0; i < here; ++i) token[i] = p + i * keys.token_bytes;
    return;
  }
  // One division for all of them: where pages hold one token, a division each took 2% to 17% of the whole score.
  int64_t block = first / keys.block_size, slot = first % keys.block_size;
  for (int64_t i = 0; i < here; ++block, slot = 0) {
    const char* p = keys.base + keys.block_table[block] * keys.block_bytes + slot * keys.token_bytes;
    for (int64_t left = smaller(keys.block_size - slot, here - i); left; --left, ++i, p += keys.token_bytes)
      token[i] = p;
  }
}

// Up to kLanes elements from `p` on, the rest zeros; never reads beyond them.
template <class T>
SPECPREFILL_INLINE vf load_part(const char* p, int64_t count, int64_t dim_bytes) {
  typename T::stored part[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) memcpy(&part[i], p + i * dim_bytes, sizeof part[i]);
  return T::load(part);
}

template <class T>
static void pack_panel(const KeySource& keys, const char* const (&token)[kPanel], float* panel) {
  constexpr int64_t item = sizeof(typename T::stored);
  const bool contiguous = keys.dim_bytes == item;
  const int64_t whole = contiguous ? keys.head_dim / kLanes * kLanes : 0;
  for (int k = 0; k < kPanel; ++k) {
    float* out = panel + k * kLanes;
    if (!token[k]) {
      for (int64_t d = 0; d < keys.head_dim; d += kLanes, out += kPanel * kLanes) store(out, vf{});
      continue;
    }
    for (int64_t d = 0; d < whole; d += kLanes, out += kPanel * kLanes) store(out, T::load(token[k] + d * item));
    for (int64_t d = whole; d < keys.head_dim; d += kLanes, out += kPanel * kLanes) {
      store(out, load_part<T>(token[k] + d * keys.dim_bytes, smaller(keys.head_dim - d, kLanes), keys.dim_bytes));
    }
  }
}

static void pack_panel(const KeySource& keys, const char* const (&token)[kPanel], float* panel) {
  switch (keys.dtype) {
    case SPECPREFILL_F32: return pack_panel<F32>(keys, token, panel);
    case SPECPREFILL_F16: return pack_panel<F16>(keys, token, panel);
    case SPECPREFILL_BF16: return pack_panel<BF16>(keys, token, panel);
    case SPECPREFILL_F8_E4M3FN: return pack_panel<F8E4M3FN>(keys, token, panel);
    default: return pack_panel<F8E5M2>(keys, token, panel);
  }
}

// ---- products: kVectors vectors of rows by the keys of a panel, kSums accumulators at a time ----

// Products go to `out`; `best` is raised to their maxima. `next`: keys of the panel that follows, fetched meanwhile.
template <int kVectors>
static void multiply(const float* query, int64_t stride, const float* panel, int64_t head_dim, float* out, float* best,
                     const char* const* next, int64_t next_bytes) {
  constexpr int kKeys = kSums / kVectors;
  static_assert(kPanel % kKeys == 0, "a panel is whole steps");
  vf top[kVectors];
  for (int v = 0; v < kVectors; ++v) top[v] = load(best + v * kLanes);
  for (int first = 0; first < kPanel; first += kKeys) {
    vf sum[kKeys][kVectors] = {};
    const float* q = query;
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      const float* key = panel + (d * kPanel + first * kLanes);
      if (next) {
        const int64_t at = d * next_bytes;
        for (int k = 0; k < kKeys; ++k) __builtin_prefetch((const void*)((uintptr_t)next[first + k] + at));
      }
      const int64_t dims = smaller(head_dim - d, kLanes);
      for (int64_t i = 0; i < dims; ++i, q += stride) {
        vf rows[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) rows[v] = load(q + v * kLanes);
#pragma GCC unroll 24
        for (int k = 0; k < kKeys; ++k) {
          const vf element = splat(key[k * kLanes + i]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[k][v] = fma(element, rows[v], sum[k][v]);
        }
      }
    }
#pragma GCC unroll 24
    for (int k = 0; k < kKeys; ++k) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store(out + (first + k) * stride + v * kLanes, sum[k][v]);
        top[v] = max(top[v], sum[k][v]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) store(best + v * kLanes, top[v]);
}

// ---- exponentials of kVectors vectors of rows over a tile ----

SPECPREFILL_INLINE vi load(const int32_t* p) {
  vi x;
  memcpy(&x, p, sizeof x);
  return x;
}

struct Column {  // of a tile: all its tokens, kVectors vectors of rows
  const ScoreTile* tile;
  int64_t at;      // first of these rows
  int64_t stride;  // floats from token to token
  float* x;        // the first token's
};

// Soft-capped and masked scores, back to x; their maxima. NaN passes unseen.
template <int kVectors>
static void mask(const Column& column, vf (&best)[kVectors]) {
  const ScoreTile& tile = *column.tile;
  const vf nothing = splat(-__builtin_inff());
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const vi begin = load(tile.begin + column.at + v * kLanes), end = load(tile.end + column.at + v * kLanes);
    vf top = nothing;
    for (int64_t i = 0; i < tile.count; ++i) {
      float* p = column.x + i * column.stride + v * kLanes;
      vf s = load(p);
      if (tile.softcap != 0.0f) s = splat(tile.softcap) * tanh(s);
      const vi token = vi{} + (int32_t)(tile.first + i);
      s = ((token >= begin) & (token < end)) ? s : nothing;
      top = max(top, s);
      store(p, s);
    }
    best[v] = top;
  }
}

// 2^(x - shift), back to x; their sums, in four parts so that one addition need not wait for another.
template <int kVectors, bool kMasked>
static void exponentials(const Column& column, const vf (&shift)[kVectors], vf (&sums)[kVectors]) {
  const ScoreTile& tile = *column.tile;
  vf part[4][kVectors] = {};
  vi begin[kVectors], end[kVectors];
  for (int v = 0; kMasked && v < kVectors; ++v) {
    begin[v] = load(tile.begin + column.at + v * kLanes), end[v] = load(tile.end + column.at + v * kLanes);
  }
  for (int64_t i = 0; i < kTile; i += 4) {
    if (kMasked && i >= tile.count) break;
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* p = column.x + (i + u) * column.stride + v * kLanes;
        vf e = exp2(load(p) - shift[v]);
        if (kMasked) {  // again: -Inf - shift is 0 already, but not where NaN lay or `shift` is Inf
          const vi token = vi{} + (int32_t)(tile.first + i + u);
          e = ((token >= begin[v]) & (token < end[v])) ? e : vf{};
        }
        part[u][v] += e;
        store(p, e);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) sums[v] = (part[0][v] + part[1][v]) + (part[2][v] + part[3][v]);
}

template <int kVectors>
static void exponentiate(const ScoreTile& tile, int64_t vector, bool whole) {
  const int64_t at = vector * kLanes, stride = tile.vectors * kLanes;
  const Column column{&tile, at, stride, tile.weights + tile.first * stride + at};
  vf best[kVectors], shift[kVectors], sums[kVectors];
  for (int v = 0; v < kVectors; ++v)
    best[v] = load(tile.maxima + at + v * kLanes);  // of the product, where all is seen
  if (!whole || tile.softcap != 0.0f) mask<kVectors>(column, best);
  for (int v = 0; v < kVectors; ++v) {
    if (tile.lse) best[v] = load(tile.lse + at + v * kLanes);
    store(tile.maxima + at + v * kLanes, best[v]);
    // A row that sees nothing, or NaN alone, which then stays NaN.
    shift[v] = !tile.lse && best[v] == splat(-__builtin_inff()) ? vf{} : best[v];
  }
  if (whole) {
    exponentials<kVectors, false>(column, shift, sums);
  } else {
    exponentials<kVectors, true>(column, shift, sums);
  }
  for (int v = 0; v < kVectors; ++v) store(tile.sums + at + v * kLanes, sums[v]);
}

// ---- a tile ----

// Up to 4 vectors of rows at a time, as alike as can be: 5 are 3 and 2.
template <class F>
SPECPREFILL_INLINE void in_groups(int64_t vectors, const F& run) {
  int64_t groups = (vectors + 3) / 4;
  for (int64_t first = 0; groups; --groups) {
    const int64_t count = (vectors - first + groups - 1) / groups;
    run(first, (int)count);
    first += count;
  }
}

static void multiply(const ScoreTile& tile, int64_t i, const char* const* next) {
  const int64_t stride = tile.vectors * kLanes;
  float* out = tile.weights + (tile.first + i) * stride;
  const int64_t bytes = tile.keys.dim_bytes;
  in_groups(tile.vectors, [&](int64_t vector, int count) {
    const int64_t at = vector * kLanes;
    const float* q = tile.query + at;
    float *o = out + at, *best = tile.maxima + at;
    switch (count) {
      case 1: return multiply<1>(q, stride, tile.panel, tile.keys.head_dim, o, best, vector ? nullptr : next, bytes);
      case 2: return multiply<2>(q, stride, tile.panel, tile.keys.head_dim, o, best, vector ? nullptr : next, bytes);
      case 3: return multiply<3>(q, stride, tile.panel, tile.keys.head_dim, o, best, vector ? nullptr : next, bytes);
      default: return multiply<4>(q, stride, tile.panel, tile.keys.head_dim, o, best, vector ? nullptr : next, bytes);
    }
  });
}

static void score_tile(const ScoreTile& tile) {
  const int64_t stride = tile.vectors * kLanes, last = tile.first + tile.count;
  bool seen = false, whole = tile.count == kTile;
  for (int64_t row = 0; row < stride; ++row) {
    seen |= larger(tile.begin[row], tile.first) < smaller(tile.end[row], last);
    whole &= tile.begin[row] <= tile.first && tile.end[row] >= last;
    tile.maxima[row] = -__builtin_inff();
  }
  if (!seen) {  // its keys are not touched
    float* x = tile.weights + tile.first * stride;
    for (int64_t i = 0; i < tile.count * stride; i += kLanes) store(x + i, vf{});
    for (int64_t row = 0; row < stride; row += kLanes) {
      store(tile.sums + row, vf{});
      if (tile.lse) store(tile.maxima + row, load(tile.lse + row));
    }
    return;
  }
  const char* tokens[2][kPanel];
  locate(tile.keys, tile.first, smaller(tile.count, kPanel), tokens[0]);
  for (int64_t i = 0; i < tile.count; i += kPanel) {  // what lies behind is masked below, whatever it is
    const char* const(&here)[kPanel] = tokens[i / kPanel % 2];
    const char*(&next)[kPanel] = tokens[(i / kPanel + 1) % 2];
    pack_panel(tile.keys, here, tile.panel);
    locate(tile.keys, tile.first + i + kPanel, smaller(tile.count - i - kPanel, kPanel), next);
    multiply(tile, i, next);
  }
  in_groups(tile.vectors, [&](int64_t vector, int count) {
    switch (count) {
      case 1: return exponentiate<1>(tile, vector, whole);
      case 2: return exponentiate<2>(tile, vector, whole);
      case 3: return exponentiate<3>(tile, vector, whole);
      default: return exponentiate<4>(tile, vector, whole);
    }
  });
}

// ---- the softmax's denominator, over the tiles of a vector of rows ----

static int64_t combine(float* maxima, const float* sums, int64_t tiles, int64_t vectors, const float* present,
                       bool lse) {
  const vf nothing = splat(-__builtin_inff());
  const int64_t stride = vectors * kLanes;
  for (int64_t at = 0; at < stride; at += kLanes) {
    vf maximum = lse ? vf{} : nothing, total = {};
    for (int64_t i = 0; !lse && i < tiles; ++i) maximum = max(maximum, load(maxima + i * stride + at));
    const vi unseen = maximum == nothing;
    for (int64_t i = 0; i < tiles; ++i) {
      const vf factor = lse ? splat(1.0f) : exp2(load(maxima + i * stride + at) - (unseen ? vf{} : maximum));
      total += factor * load(sums + i * stride + at);
      store(maxima + i * stride + at, factor);
    }
    // Inf - Inf and NaN - NaN are not 0. A maximum of Inf makes a sum of NaN, and so does NaN where nothing else was
    // seen.
    const vi good = total - total == vf{};
    const vf here = load(present + at);
    const vf factor = unseen ? vf{} : lse ? here : here / total;
    for (int64_t i = 0; i < tiles; ++i) store(maxima + i * stride + at, load(maxima + i * stride + at) * factor);
    for (int i = 0; i < kLanes; ++i) {
      if (!good[i] && here[i] != 0.0f) return at + i;
    }
  }
  return -1;
}

static void exp2_array(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(y + i, exp2(load(x + i)));
}

#define SPECPREFILL_QUOTE_(x) #x
#define SPECPREFILL_QUOTE(x) SPECPREFILL_QUOTE_(x)

extern const ScoreKernels score_kernels;
const ScoreKernels score_kernels = {
    SPECPREFILL_QUOTE(SPECPREFILL_ISA), kLanes, kPanel, score_tile, combine, pool_max, fold, exp2_array};

}  // namespace SPECPREFILL_ISA
}  // namespace specprefill
