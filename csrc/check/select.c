/* select_chunks against a search for the best chunk, one after the other. */
#include <math.h>
#include <string.h>

#include "check.h"

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t budget_in_chunks(const specprefill_select* args, int64_t num_chunks) {
  const double exact_budget =
      args->budget == SPECPREFILL_KEEP_RATIO ? args->keep * (double)num_chunks : args->keep / (double)args->chunk_size;
  const double nearest = floor(exact_budget + 0.5);
  double rounded = args->rounding == SPECPREFILL_CEIL ? ceil(exact_budget) : floor(exact_budget);
  if (fabs(exact_budget - nearest) <= 1e-9 * (double)larger(1, num_chunks)) rounded = nearest;
  return larger(1, smaller((int64_t)rounded, num_chunks));
}

static int is_protected(const specprefill_select* args, int64_t b, int64_t length, int64_t t) {
  if (t < args->sink || t >= length - args->tail) return 1;
  return args->protect != NULL && args->protect[b * args->protect_stride_batch + t * args->protect_stride_token] != 0;
}

static double importance_at(const specprefill_select* args, int64_t b, int64_t t) {
  return args->importance[b * args->importance_stride_batch + t * args->importance_stride_token];
}

/* Marks the chunks to keep of sequence b; returns whether protected ones overflow the budget. */
static int expect_chunks(const specprefill_select* args, int64_t b, int64_t length, uint8_t* keep) {
  const int64_t chunk = args->chunk_size, num_chunks = (length + chunk - 1) / chunk;
  const int by_mass = args->budget == SPECPREFILL_KEEP_MASS;
  double* mass = exact(num_chunks * (int64_t)sizeof(double));
  double total = 0, reached = 0;
  int64_t kept = 0;
  for (int64_t c = 0; c < num_chunks; ++c) {
    const int64_t end = smaller((c + 1) * chunk, length);
    mass[c] = 0;
    keep[c] = 0;
    for (int64_t t = c * chunk; t < end; ++t) {
      mass[c] += importance_at(args, b, t);
      if (is_protected(args, b, length, t)) keep[c] = 1;
    }
    total += mass[c];
    kept += keep[c];
    if (keep[c]) reached += mass[c];
  }
  const int64_t budget = by_mass ? num_chunks : budget_in_chunks(args, num_chunks);
  const int overflow = !by_mass && kept > budget;
  while (kept < budget && !(by_mass && kept > 0 && reached >= (args->keep - 1e-9) * total)) {
    int64_t best = -1;
    float best_key = 0;
    for (int64_t c = 0; c < num_chunks; ++c) {
      const int64_t size = smaller((c + 1) * chunk, length) - c * chunk;
      const float key = (float)(by_mass ? mass[c] : mass[c] / (double)size);
      if (!keep[c] && (best < 0 || key > best_key)) {
        best = c;
        best_key = key;
      }
    }
    keep[best] = 1;
    reached += mass[best];
    ++kept;
  }
  free(mass);
  return overflow;
}

static int compare(const specprefill_select* args) {
  uint8_t* keep = exact(args->max_len);
  int failed = 0;
  for (int64_t b = 0; b < args->batch && !failed; ++b) {
    const int64_t length = args->seq_lens[b];
    const int overflow = expect_chunks(args, b, length, keep);
    int64_t kept = 0;
    for (int64_t t = 0; t < length && !failed; ++t) {
      if (!keep[t / args->chunk_size]) continue;
      if (kept >= args->width || args->indices[b * args->width + kept] != t) {
        failed = report("indices[%lld, %lld]: expected %lld of a prompt of %lld", (long long)b, (long long)kept,
                        (long long)t, (long long)length);
      }
      ++kept;
    }
    for (int64_t i = kept; i < args->width && !failed; ++i) {
      if (args->indices[b * args->width + i] != -1)
        failed = report("indices: expected -1 from %lld on", (long long)kept);
    }
    if (!failed && (args->num_kept[b] != kept || args->overflow[b] != overflow)) {
      failed = report("num_kept, overflow: expected %lld, %d, got %d, %d", (long long)kept, overflow, args->num_kept[b],
                      args->overflow[b]);
    }
  }
  free(keep);
  return failed;
}

/* A length of sink or tail: often none, often one that straddles chunks, now and then without end. */
static int64_t random_protected(random_source* source, int64_t chunk) {
  if (random_once_in(source, 20)) return INT64_MAX;
  return random_once_in(source, 2) ? 0 : random_int(source, 0, 3 * chunk);
}

int check_select(random_source* source) {
  specprefill_select args;
  memset(&args, 0, sizeof args);
  args.batch = random_int(source, 1, 3);
  args.max_len = random_int(source, 1, 900);
  args.chunk_size = random_once_in(source, 2) ? 32 : random_int(source, 1, 70);
  args.rounding = (int32_t)random_int(source, 0, 1);
  args.budget = (int32_t)random_int(source, 0, 2);
  args.keep = (double)random_int(source, 1, 20) / 20;
  if (args.budget == SPECPREFILL_KEEP_TOKENS) args.keep = (double)random_int(source, 1, args.max_len + 40);
  if (args.budget == SPECPREFILL_KEEP_TOKENS && random_once_in(source, 10)) args.keep = 1e18;
  args.sink = random_protected(source, args.chunk_size);
  args.tail = random_protected(source, args.chunk_size);
  args.importance_stride_token = random_int(source, 1, 2);
  args.importance_stride_batch = args.max_len * args.importance_stride_token;
  const int64_t items = args.importance_stride_batch * args.batch - (args.importance_stride_token - 1);
  float* importance = exact(items * (int64_t)sizeof(float));
  /* Sixteenths: sums are exact, so ties are ties in any order of summation. */
  const int64_t levels = random_once_in(source, 2) ? 4 : 1000;
  for (int64_t i = 0; i < items; ++i) importance[i] = (float)random_int(source, 1, levels) / 16;
  args.importance = importance;
  int32_t* seq_lens = exact_int32(args.batch);
  for (int64_t b = 0; b < args.batch; ++b) seq_lens[b] = (int32_t)random_int(source, 1, args.max_len);
  args.seq_lens = seq_lens;
  uint8_t* protect = exact(args.batch * args.max_len);
  for (int64_t i = 0; i < args.batch * args.max_len; ++i) protect[i] = (uint8_t)random_once_in(source, 200);
  if (random_once_in(source, 2)) args.protect = protect;
  args.protect_stride_batch = args.max_len;
  args.protect_stride_token = 1;
  args.width = specprefill_select_width(&args);
  args.indices = exact_int32(args.batch * args.width);
  args.num_kept = exact_int32(args.batch);
  args.overflow = exact(args.batch);
  int failed = specprefill_select_cpu(&args, 2) != SPECPREFILL_OK;
  if (failed) {
    report("select: %s", specprefill_last_error());
  } else {
    failed = compare(&args);
  }
  if (!failed && cuda_is_emulated()) {
    memset(args.indices, 0x7F, (size_t)(args.batch * args.width) * sizeof(int32_t));
    memset(args.num_kept, 0x7F, (size_t)args.batch * sizeof(int32_t));
    failed = accepted(cuda_select(&args), "select on CUDA");
    if (!failed && compare(&args)) failed = report("  by the CUDA kernel");
  }
  free(importance);
  free(seq_lens);
  free(protect);
  free(args.indices);
  free(args.num_kept);
  free(args.overflow);
  return failed;
}
