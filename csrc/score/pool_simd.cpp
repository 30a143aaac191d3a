// Pooling and folding of the score, built once per instruction set: windows of probabilities are summed vector by
// vector of rows, token after token, and the best of all heads and layers is turned into rows of the state.

#if defined(__GNUC__) && !defined(__clang__)  // as in cpu_simd.cpp
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "score/pool_simd.h"

#include "common/simd.h"

namespace specprefill {
namespace SPECPREFILL_ISA {

SPECPREFILL_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SPECPREFILL_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The probabilities of tokens [from, from + count), zero outside the prompt.
static void probabilities(const PoolRows& rows, int64_t from, int64_t count, float* x) {
  int64_t t = from;
  const int64_t end = from + count, inside = smaller(end, rows.length);
  for (; t < smaller(0, end); ++t, x += kLanes) store(x, vf{});
  while (t < inside) {
    const int64_t tile = t / kTile, stop = smaller((tile + 1) * kTile, inside);
    const vf factor = load(rows.factors + tile * rows.stride);
    const float* p = rows.weights + t * rows.stride;
    for (; t < stop; ++t, x += kLanes, p += rows.stride) store(x, load(p) * factor);
  }
  for (; t < end; ++t, x += kLanes) store(x, vf{});
}

// sums[i] = x[i] + ... + x[i + width - 1], from sums over 1, 2, 4, ... neighbours: log2(width) additions per element,
// in an order that does not depend on where the tile begins. Destroys x.
static void window_sums(float* x, int64_t count, int64_t width, float* sums) {
  int64_t offset = 0, have = count + width - 1;
  for (int64_t power = 1; power <= width; power *= 2) {
    if (width & power) {
      const float* part = x + offset * kLanes;
      for (int64_t i = 0; i < count * kLanes; i += kLanes) {
        store(sums + i, offset == 0 ? load(part + i) : load(sums + i) + load(part + i));
      }
      offset += power;
    }
    if (power * 2 <= width) {
      have -= power;
      for (int64_t i = 0; i < have * kLanes; i += kLanes) store(x + i, load(x + i) + load(x + i + power * kLanes));
    }
  }
}

SPECPREFILL_INLINE void raise(float* best, vf x) { store(best, max(load(best), x)); }

// Sums of 13 neighbours, the paper's width, on the way: what was added for a token is kept for the next ones, in rings
// that lie in registers and L1. Five additions per element.
class Thirteen {
 public:
  // The sum of the 13 elements that end with x, the one at j, which is `u` modulo 16.
  SPECPREFILL_INLINE_MEMBER vf next(int u, vf x) {
    twos_[(u + 15) % 16] = before_ + x;                                    // x[j - 1] + x[j]
    fours_[(u + 13) % 16] = twos_[(u + 13) % 16] + twos_[(u + 15) % 16];   // x[j - 3] ...
    eights_[(u + 9) % 16] = fours_[(u + 9) % 16] + fours_[(u + 13) % 16];  // x[j - 7] ...
    before_ = x;
    return (eights_[(u + 4) % 16] + fours_[(u + 12) % 16]) + x;  // x[j - 12] ... 8, 4 and 1
  }

 private:
  vf before_{}, twos_[16]{}, fours_[16]{}, eights_[16]{};
};

static void pool_13(const PoolRows& rows, float* best, int64_t stride) {
  Thirteen sums;
  // Token rows.first - 6 is element 0; the first whole window ends with element 12, and elements come 16 at a time.
  const int64_t from = rows.first - 6;
  float* part = rows.window;
  for (int64_t j = 0; j < rows.count + 12; j += 16) {
    const int64_t t = from + j, tile = t / kTile, wanted = smaller(16, rows.count + 12 - j);
    const float* p = part;
    int64_t step = kLanes;
    vf factor = splat(1.0f);
    if (t >= 0 && t + 16 <= rows.length && (t + 15) / kTile == tile) {
      p = rows.weights + t * rows.stride, step = rows.stride;
      factor = load(rows.factors + tile * rows.stride);
    } else {
      probabilities(rows, t, 16, part);
    }
    if (j > 0 && wanted == 16) {
#pragma GCC unroll 16
      for (int u = 0; u < 16; ++u) raise(best + (j + u - 12) * stride, sums.next(u, load(p + u * step) * factor));
    } else {
      for (int u = 0; u < wanted; ++u) {
        const vf sum = sums.next(u, load(p + u * step) * factor);
        if (j + u >= 12) raise(best + (j + u - 12) * stride, sum);
      }
    }
  }
}

void pool_max(const PoolRows& rows, float* best, int64_t stride) {
  if (rows.width == 13) return pool_13(rows, best, stride);
  probabilities(rows, rows.first - rows.width / 2, rows.count + rows.width - 1, rows.window);
  const float* sums = rows.window;
  if (rows.width > 1) {
    window_sums(rows.window, rows.count, rows.width, rows.sums);
    sums = rows.sums;
  }
  for (int64_t i = 0; i < rows.count; ++i) raise(best + i * stride, load(sums + i * kLanes));
}

// What the sums of windows around kLanes tokens from t on are divided by.
static vf divisors(const StateRows& rows, int64_t t) {
  vf divisor = splat(rows.divisor);
  if (rows.divisor == 0.0f) {
    const int64_t half = rows.width / 2;
    for (int64_t i = 0; i < kLanes; ++i) {
      divisor[i] = (float)(smaller(t + i + half, rows.length - 1) - larger(t + i - half, 0) + 1);
    }
  }
  return divisor;
}

SPECPREFILL_INLINE void raise_state(float* state, int64_t count, vf pooled) {
  if (count == kLanes) {
    const vf old = load(state);
    store(state, pooled > old ? pooled : old);
    return;
  }
  for (int64_t i = 0; i < count; ++i) state[i] = pooled[i] > state[i] ? pooled[i] : state[i];
}

void fold(const StateRows& rows, float* best) {
  const int64_t lanes = rows.padded < kLanes ? kLanes : rows.padded;  // per token
  for (int64_t i = 0; i < rows.count; i += kLanes) {
    const int64_t here = smaller(kLanes, rows.count - i);
    const vf divisor = divisors(rows, rows.first + i);
    for (int64_t block = 0; block < lanes; block += kLanes) {
      vf tokens[kLanes];
      for (int64_t k = 0; k < kLanes; ++k) tokens[k] = k < here ? load(best + (i + k) * lanes + block) : vf{};
      transpose(tokens);  // now one vector per lane
      const int64_t heads = rows.padded < kLanes ? kLanes / rows.padded : 1;
      for (int64_t n = 0; n < kLanes && n < rows.padded && block + n < rows.rows; ++n) {
        vf top = tokens[n];
        for (int64_t head = 1; head < heads; ++head) top = max(top, tokens[head * rows.padded + n]);
        raise_state(rows.state + (block + n) * rows.stride + rows.first + i, here, top / divisor);
      }
    }
  }
}

}  // namespace SPECPREFILL_ISA
}  // namespace specprefill
