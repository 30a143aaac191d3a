// The host's side of copy.cuh: rows as few dimensions of the widest words that sizes, strides and addresses allow.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "gather/copy.cuh"

namespace specprefill {

// Dimensions in bytes, outermost first, of what is read and what is written.
class ByteDims {
 public:
  // A dimension of one element is none.
  void add(int64_t size, int64_t source, int64_t target) {
    if (size != 1) append(size, source, target);
  }

  // The bytes of one element: last of all.
  void add_item(int64_t bytes) { append(bytes, 1, 1); }

  int num() const { return num_; }

  // The widest word that divides all of these and everything that is passed here too.
  int word_bytes(std::initializer_list<uint64_t> others) const {
    uint64_t all = static_cast<uint64_t>(size_[num_ - 1]);
    for (int i = 0; i + 1 < num_; ++i) all |= static_cast<uint64_t>(source_[i]) | static_cast<uint64_t>(target_[i]);
    for (const uint64_t other : others) all |= other;
    int word = 16;
    while (all % static_cast<uint64_t>(word)) word /= 2;
    return word;
  }

  RowShape in_words(int word) const {
    RowShape shape{};
    shape.word_bytes = word;
    shape.words = 1;
    for (int i = 0; i < num_; ++i) {
      const bool last = i + 1 == num_;
      const int64_t size = last ? size_[i] / word : size_[i];
      shape.words *= size;
      if (last && size == 1 && num_ > 1) break;
      shape.sizes[i] = size;
      shape.source_strides[i] = last ? 1 : source_[i] / word;
      shape.target_strides[i] = last ? 1 : target_[i] / word;
      shape.num = i + 1;
    }
    return shape;
  }

 private:
  // What goes on where the dimension before it ends is a part of that.
  void append(int64_t size, int64_t source, int64_t target) {
    if (num_ && source_[num_ - 1] == size * source && target_[num_ - 1] == size * target) {
      size_[num_ - 1] *= size;
      source_[num_ - 1] = source, target_[num_ - 1] = target;
      return;
    }
    size_[num_] = size, source_[num_] = source, target_[num_] = target;
    ++num_;
  }

  int num_ = 0;
  int64_t size_[RowShape::kMaxDims] = {}, source_[RowShape::kMaxDims] = {}, target_[RowShape::kMaxDims] = {};
};

inline RowTiles row_tiles(const RowShape& shape, int threads) {
  const int64_t tile = static_cast<int64_t>(threads) * kWordsPerThread;
  RowTiles tiles;
  tiles.words = static_cast<unsigned>(std::min(std::max<int64_t>(shape.words, 1), tile));
  tiles.rows = static_cast<unsigned>(tile / tiles.words);
  tiles.along = static_cast<unsigned>(std::max<int64_t>((shape.words + tile - 1) / tile, 1));
  return tiles;
}

}  // namespace specprefill
