// What the portable part of the score (cpu.cpp) asks of the code built per instruction set (cpu_simd.cpp,
// pool_simd.cpp).
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace specprefill {

// Tokens per tile: a multiple of every instruction set's panel (24, 24, 12, 8 keys). The weights of a tile, 32 rows
// say, are 48 KiB and stay in L2 between the product and the exponentials.
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
  int64_t tokens;  // that may be read
};

// One tile of one KV head: all query rows that share it, against up to kTile keys. Rows lie in `vectors` vectors of
// `lanes` lanes, see lanes.h; arrays [..., row] below have vectors * lanes elements in their last dimension.
struct ScoreTile {
  KeySource keys;
  const float* query;  // [head_dim, row], scaled so that products are exponents of 2; zeros where no row lies
  int64_t vectors;
  int64_t first, count;        // tokens [first, first + count)
  const int32_t *begin, *end;  // [row] each sees tokens [begin, end)
  const float* lse;            // [row], in exponents of 2; nullptr: not given
  float softcap;               // in exponents of 2; 0: none; otherwise the query is scaled to give tanh's argument
  float* weights;              // [token, row]; whole tiles; becomes 2^(score - maximum of the tile, or lse)
  float *maxima, *sums;        // [row], of this tile; lse instead of the maxima, when it is given
  float* panel;                // scratch of panel_keys * head_dim floats, head_dim rounded up to `lanes`
};

// One vector of rows around a tile, ready to be pooled.
struct PoolRows {
  const float* weights;  // of token 0
  const float* factors;  // of tile 0: turn a tile's weights into probabilities
  int64_t stride;        // floats from token to token of the weights, and from tile to tile of the factors
  int64_t length;        // tokens of the prompt
  int64_t first, count;  // tokens wanted
  int64_t width;         // odd
  float* window;         // scratch of (kTile + width + 1) * lanes floats
  float* sums;           // scratch of kTile * lanes floats
};

// The state's rows of one sequence around a tile.
struct StateRows {
  float* state;          // row 0, token 0
  int64_t stride;        // from row to row; 0: all rows go to one
  int64_t rows, padded;  // of a head, see lanes.h
  int64_t length;        // tokens of the prompt
  int64_t first, count;  // tokens of the tile
  int64_t width;         // of the window
  float divisor;         // of its sums; 0: the part of the window that lies in the prompt
};

struct ScoreKernels {
  const char* name;
  int64_t lanes;
  int64_t panel_keys;

  void (*score_tile)(const ScoreTile& tile);

  // Turns the maxima of `tiles` tiles, [tile, row], into factors, in place: with them, weights become probabilities.
  // Rows whose maximum is -Inf, and those where `present` is 0, get zeros; with `lse`, the others ones. Returns the
  // first row that is not finite, or -1.
  int64_t (*combine)(float* maxima, const float* sums, int64_t tiles, int64_t vectors, const float* present, bool lse);

  // best[i * stride ...] = max(itself, sum of the window centred on token first + i).
  void (*pool_max)(const PoolRows& rows, float* best, int64_t stride);

  // state = max(state, best / divisor); best is [token, lane of padded rows], and is destroyed.
  void (*fold)(const StateRows& rows, float* best);

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
