// What the portable part of the score (cpu.cpp) asks of the code built per instruction set (cpu_simd.cpp).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace specprefill {

// Tokens per tile: a multiple of every instruction set's panel (48, 24, 12, 8 keys). The fp32 products of a tile, 32
// rows say, are 48 KiB and stay in L2 between the product and the exponentials.
constexpr int64_t kTile = 384;

// The keys of one sequence and one KV head, wherever they lie.
struct KeySource {
  const char* base;            // token 0 of the sequence; paged: the pool's first block
  int64_t token_bytes;         // from one token to the next (within a block)
  int64_t dim_bytes;           // from one element to the next
  const int32_t* block_table;  // nullptr: not paged
  int64_t block_size, block_bytes;
  int32_t dtype;
  int64_t head_dim;
};

// One tile of one KV head: all query rows that share it, against up to kTile keys.
struct ScoreTile {
  KeySource keys;
  const float* query;  // packed [row block][dim][row in block], scaled so that products are exponents of 2
  int64_t num_rows;
  int64_t first, count;  // tokens [first, first + count)
  const int64_t* begin;  // [num_rows] each row sees tokens [begin, end)
  const int64_t* end;
  const float* lse;  // [num_rows] in powers of 2, or nullptr
  float softcap;     // in powers of 2; 0: none
  float* weights;    // row 0, token 0; kTile-padded; becomes 2^(score - maximum of the tile, or lse)
  int64_t stride;    // between rows of weights
  float* maxima;     // [num_rows x stats_stride], at this tile; lse instead, when it is given
  float* sums;
  int64_t stats_stride;
  float* panel;  // scratch of head_dim * panel_keys floats
};

// One query row's weights around a tile, ready to be pooled.
struct PoolRow {
  const float* weights;  // token 0
  const float* factors;  // one per tile: turns the tile's weights into probabilities
  int64_t length;        // tokens of the prompt
  int64_t first, count;  // tokens wanted
  int64_t width;         // odd
  float* window;         // scratch of kTile + width + 2 * 16 floats
  float* sums;           // scratch of kTile + 16 floats
};

struct ScoreKernels {
  const char* name;
  int64_t block_rows;  // the packed query is padded to a multiple of this
  int64_t panel_keys;

  void (*score_tile)(const ScoreTile& tile);

  // Turns a row's maxima and sums over its tiles (padded to 16 with -Inf and 0) into factors, in place of the maxima.
  // A row whose maximum is -Inf gets zeros. False when the row is not finite.
  bool (*combine)(float* maxima, const float* sums, int64_t num_tiles);

  // best[i] = max(best[i], sum of the window centred on token first + i).
  void (*pool_max)(const PoolRow& row, float* best);

  // state[i] = max(state[i], best[i] / divisor); divisor 0: the part of the window that lies in the prompt.
  void (*fold)(const float* best, float* state, int64_t first, int64_t count, int64_t length, int64_t width,
               float divisor);

  void (*exp2)(const float* x, float* y, int64_t count);  // for tests of its error bound; count a multiple of 16
};

const ScoreKernels& score_kernels();  // of this processor

namespace generic {
extern const ScoreKernels score_kernels;
}
namespace avx2 {
extern const ScoreKernels score_kernels;
}
namespace avx512 {
extern const ScoreKernels score_kernels;
}

}  // namespace specprefill
