// What can be wrong with the arguments of a score call, found before anything is computed.
#pragma once

#include "specprefill.h"

namespace specprefill {

// Pointers, sizes, strides and options: all that can be seen without reading tensors.
int check_score_sizes(const specprefill_score& args, const specprefill_layer* layers, int64_t num_layers);

// These, and the contents of host memory: lengths, offsets, blocks, lse.
int check_score(const specprefill_score& args, const specprefill_layer* layers, int64_t num_layers);

// Valid look-ahead rows of sequence b.
int64_t rows_of(const specprefill_score& args, int64_t b);

// Prompt tokens of sequence b.
int64_t prompt_length(const specprefill_score& args, int64_t b);

// Tokens whose keys are read: the prompt's, and behind it the look-ahead tokens' where the softmax counts them.
int64_t readable_length(const specprefill_score& args, int64_t b);

}  // namespace specprefill
