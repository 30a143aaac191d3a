// Copies rows of words, each from its own place to its own place: what all gathers end in.
#pragma once

#include "common/device.cuh"
#include "specprefill.h"

namespace specprefill {

// A row that is not there: as a source it is zeros, as a target nothing is written.
constexpr int64_t kNoRow = INT64_MIN;

struct alignas(16) Row {
  int64_t source, target;  // in words from the base of each
};

// What a row is: words along some dimensions, the last one fastest. Most rows have one.
struct RowShape {
  static constexpr int kMaxDims = SPECPREFILL_MAX_DIMS + 1;
  int num;
  int word_bytes;                                                               // 16, 8, 4, 2 or 1
  int64_t words;                                                                // of the whole row
  int64_t sizes[kMaxDims], source_strides[kMaxDims], target_strides[kMaxDims];  // in words
};

// Words that a thread copies at a time: 4 of 16 bytes, which at 512 threads a processor are 32 KiB on their way. HBM
// needs 18 (700 ns at 25 bytes per ns and processor).
constexpr int kWordsPerThread = 4;

// How rows are cut into tiles of one block: some whole rows, or a piece of one.
struct RowTiles {
  unsigned rows;   // of a tile
  unsigned words;  // of each row in a tile
  unsigned along;  // tiles along a row
};

// 64-bit division takes some 80 instructions, and few tensors need it.
__device__ __forceinline__ uint64_t divide(uint64_t a, uint64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Adds where word `w` of a row lies to both.
__device__ __forceinline__ void add_word(const RowShape& shape, int64_t w, int64_t& source, int64_t& target) {
#pragma unroll 1  // few rows have more than one dimension: code that is not there is fetched faster
  for (int dim = shape.num - 1; dim > 0; --dim) {
    const auto rest = static_cast<int64_t>(divide(static_cast<uint64_t>(w), static_cast<uint64_t>(shape.sizes[dim])));
    const int64_t i = w - rest * shape.sizes[dim];
    source += i * shape.source_strides[dim];
    target += i * shape.target_strides[dim];
    w = rest;
  }
  source += w * shape.source_strides[0];
  target += w * shape.target_strides[0];
}

// Words [first, first + words) of each of `num_rows` rows, by all threads of a block; no more words than the block
// takes at a time. Neighbouring threads take neighbouring words.
template <class Word, int kThreads>
__device__ __forceinline__ void copy_words(const RowShape& shape, const void* source, void* target, const Row* rows,
                                           unsigned num_rows, int64_t first, unsigned words) {
  Word word[kWordsPerThread];
  Word* to[kWordsPerThread];
  unsigned row = threadIdx.x / words, w = threadIdx.x % words;
  const unsigned rows_on = kThreads / words, words_on = kThreads % words;
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    to[i] = nullptr;
    word[i] = Word{};
    if (row < num_rows && rows[row].target != kNoRow) {
      Row at = rows[row];
      const bool there = at.source != kNoRow;
      add_word(shape, first + w, at.source, at.target);
      to[i] = static_cast<Word*>(target) + at.target;
      if (there) word[i] = static_cast<const Word*>(source)[at.source];
    }
    row += rows_on, w += words_on;
    if (w >= words) w -= words, ++row;
  }
#pragma unroll
  for (int i = 0; i < kWordsPerThread; ++i) {
    if (to[i]) *to[i] = word[i];
  }
}

// The same for tile `along` of the rows, whatever their words are.
template <int kThreads>
__device__ __forceinline__ void copy_tile(const RowShape& shape, const RowTiles& tiles, const void* source,
                                          void* target, const Row* rows, unsigned num_rows, unsigned along) {
  const int64_t first = static_cast<int64_t>(along) * tiles.words, left = shape.words - first;
  if (left <= 0) return;  // rows without words
  const unsigned words = left < tiles.words ? static_cast<unsigned>(left) : tiles.words;
  switch (shape.word_bytes) {
    case 16: return copy_words<uint4, kThreads>(shape, source, target, rows, num_rows, first, words);
    case 8: return copy_words<uint2, kThreads>(shape, source, target, rows, num_rows, first, words);
    case 4: return copy_words<uint32_t, kThreads>(shape, source, target, rows, num_rows, first, words);
    case 2: return copy_words<uint16_t, kThreads>(shape, source, target, rows, num_rows, first, words);
    default: return copy_words<uint8_t, kThreads>(shape, source, target, rows, num_rows, first, words);
  }
}

}  // namespace specprefill
