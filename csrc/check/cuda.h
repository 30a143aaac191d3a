/* Calls of the CUDA functions beside those of the CPU functions. In the emulation, where device memory is the host's,
 * they must give the same results; on a machine without a GPU they must fail as the header says; and in a build without
 * CUDA, or where the calls would touch a real GPU's memory, none is made. */
#ifndef SPECPREFILL_CHECK_CUDA_H
#define SPECPREFILL_CHECK_CUDA_H

#include "helpers.h"

/* Whether the CUDA kernels run here, on host memory. */
int cuda_is_emulated(void);

/* What the functions below return where they make no call. */
enum { NOT_CALLED = -1 };

/* Scores and selections run on a workspace of exactly the size that the header asks for, with anything in it. */
int cuda_score(const specprefill_score* args, const specprefill_layer* layers, int64_t num_layers);
int cuda_finalize(const specprefill_finalize* args);
int cuda_select(const specprefill_select* args);
int cuda_gather_tokens(const specprefill_gather_tokens* args);
int cuda_gather_kv(const specprefill_gather_kv* args, int64_t num_caches);
int cuda_select_tokens(const specprefill_finalize* finalize, const specprefill_select* select,
                       const specprefill_gather_tokens* gather);

/* As `refused` and `accepted`, of a status from above: a size or option that is refused everywhere; and a good call, or
 * one whose contents only the CPU kernels refuse, which no GPU or an emulated one gets as far as. */
int refused_by_cuda(int status, const char* what);
int accepted_by_cuda(int status, const char* what);
int refused_contents_by_cuda(int status, const char* what);

/* What a build with CUDA says of itself. */
int check_cuda(void);

#endif
