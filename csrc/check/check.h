/* Random calls of the C interface, each compared with a plain double-precision version of the definition. Written in C,
 * so that it also proves the header is C. It runs under sanitizers, once per instruction set, and on other processors.
 */
#ifndef SPECPREFILL_CHECK_H
#define SPECPREFILL_CHECK_H

#include "cuda.h"
#include "helpers.h"

/* Each runs one random case and returns 0, or 1 after a report. */
int check_score(random_source* source);
int check_finalize(random_source* source);
int check_select(random_source* source);
int check_gather_tokens(random_source* source);
int check_gather_kv(random_source* source);
int check_select_tokens(random_source* source);

/* Calls at the edge of what the types hold: refused with a reason, or right. */
int check_score_errors(void);
int check_finalize_errors(void);
int check_select_errors(void);
int check_gather_errors(void);

#endif
