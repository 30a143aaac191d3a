// Where the sequences of a batch lie, checked against their buffers before anything is read.
#pragma once

#include <cstdint>

#include "common/status.h"

namespace specprefill {

// `value` is one of an enum's constants 0 to `last`.
int check_enum(const char* name, int32_t value, int32_t last);

// The length of sequence b, or `otherwise` when none are given.
inline int64_t length_of(const int32_t* lengths, int64_t b, int64_t otherwise) {
  return lengths ? static_cast<int64_t>(lengths[b]) : otherwise;
}

// 1 <= lengths[b] <= capacity for each sequence; `name` is the argument's.
int check_lengths(const char* name, const int32_t* lengths, int64_t batch, int64_t capacity);

// cu_seqlens starts at 0 or later, grows, and ends within the packed tokens.
int check_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t total);

// Block ids for the first `length` tokens of sequence b are in [0, num_blocks); later entries may be anything.
int check_blocks(const char* name, const int32_t* table, int64_t stride, int64_t b, int64_t length, int64_t block_size,
                 int64_t num_blocks);

// Counts and positions of a selection: each count within the width, each position within its sequence's room.
int check_selection(const int32_t* indices, int64_t stride, int64_t width, const int32_t* num_kept, int64_t b,
                    int64_t room);

}  // namespace specprefill
