/* From a batch of prompts to what is left of it: the calls of the library, on the CPU and on a GPU. */
#ifndef C_ENGINE_PRUNE_H
#define C_ENGINE_PRUNE_H

#include "arguments.h"

/* What went wrong: the call, and why in words. */
typedef struct {
  const char *call, *reason;
} failure;

/* Both return a specprefill_status and fill in *failed where it is not SPECPREFILL_OK. */
int prune_cpu(const prompt_batch* prompts, double keep_ratio, int threads, pruned_batch* pruned, failure* failed);

/* In a library with CUDA, where specprefill_cuda_unavailable() is "". */
int prune_cuda(const prompt_batch* prompts, double keep_ratio, pruned_batch* pruned, failure* failed);

/* Leaves the function with the status of a call of the library that failed. */
#define TRY(function, ...)                       \
  do {                                           \
    const int status_ = function(__VA_ARGS__);   \
    if (status_ != SPECPREFILL_OK) {             \
      failed->call = #function;                  \
      failed->reason = specprefill_last_error(); \
      return status_;                            \
    }                                            \
  } while (0)

#endif
