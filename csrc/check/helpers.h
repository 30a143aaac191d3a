/* Random numbers, items of any dtype, memory of exact size, and a way to complain. */
#ifndef SPECPREFILL_CHECK_HELPERS_H
#define SPECPREFILL_CHECK_HELPERS_H

#include <stdint.h>
#include <stdlib.h>

#include "specprefill.h"

typedef struct {
  uint64_t state;
} random_source;

uint64_t random_bits(random_source* source);
/* Uniform in [low, high]. */
int64_t random_int(random_source* source, int64_t low, int64_t high);
/* True once in `times`. */
int random_once_in(random_source* source, int64_t times);

int64_t item_size(int32_t dtype);
/* A number of moderate size, written to item `index` of `data`. */
void write_random(random_source* source, void* data, int32_t dtype, int64_t index);
double read_item(const void* data, int32_t dtype, int64_t index);

/* Memory of exactly this size, so that a sanitizer sees the first byte too many; ends the program if there is none. */
void* exact(int64_t bytes);
int32_t* exact_int32(int64_t count);

/* Block ids for `count` sequences of `width` blocks, in random order, drawn from `num_blocks`. */
int32_t* random_block_table(random_source* source, int64_t count, int64_t width, int64_t num_blocks);

/* Whether a call with a bad argument failed as it must, with a reason; prints `what` and returns 1 if not. */
int refused(int status, const char* what);
/* The same of a call whose contents are bad, which kernels that read none of them take as they come: see cuda.h. */
int refused_contents(int status, const char* what);
/* Whether a call succeeded and left no reason behind. */
int accepted(int status, const char* what);

/* Prints what differs and returns 1. */
__attribute__((format(printf, 1, 2))) int report(const char* format, ...);

#endif
