/* The definition in plain C and double precision, to check the library's results with. */
#ifndef C_ENGINE_REFERENCE_H
#define C_ENGINE_REFERENCE_H

#include "engine.h"

/* Prints the first difference of each kind to stderr and returns how many kinds there are. */
int compare_with_reference(const prompt_batch* prompts, const pruned_batch* pruned, double keep_ratio);

#endif
