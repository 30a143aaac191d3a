/* The engine's data as the library's arguments. Pointers go in as they are, so the same code describes host memory for
 * the _cpu functions and device memory for the _cuda functions. */
#ifndef C_ENGINE_ARGUMENTS_H
#define C_ENGINE_ARGUMENTS_H

#include "engine.h"
#include "specprefill.h"

specprefill_score score_arguments(const prompt_batch* prompts, float* state);
specprefill_layer layer_arguments(const prompt_batch* prompts, int layer);
specprefill_finalize finalize_arguments(const prompt_batch* prompts, const pruned_batch* pruned);
/* `pruned` may be NULL for specprefill_select_width, which reads sizes and options only. */
specprefill_select select_arguments(const prompt_batch* prompts, const pruned_batch* pruned, double keep_ratio);
specprefill_gather_tokens gather_tokens_arguments(const prompt_batch* prompts, const pruned_batch* pruned);
/* For one layer's keys or values, out of the prompts' cache into the one of what is left. */
specprefill_gather_kv gather_kv_arguments(const prompt_batch* prompts, const pruned_batch* pruned, const bf16* from,
                                          bf16* to);

#endif
