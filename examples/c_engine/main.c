/* c_engine: prunes two prompts through the C interface of specprefill, shows what it kept, and checks it. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "prune.h"
#include "reference.h"

static const char usage[] =
    "usage: c_engine [--tokens N] [--keep-ratio R] [--threads N] [--device cpu|cuda] [--help]\n"
    "  --tokens N       length of the first prompt; the second has half of it (default 1000)\n"
    "  --keep-ratio R   fraction of each prompt's chunks to keep, above 0 and at most 1 (default 0.2)\n"
    "  --threads N      threads of the CPU kernels (default 2)\n"
    "  --device cuda    the same calls on device memory; needs a build with CUDA and a GPU\n";

typedef struct {
  int64_t tokens;
  double keep_ratio;
  int threads, cuda;
} settings;

/* ---- options ---- */

enum { MOST_TOKENS = 1 << 20, MOST_THREADS = 1024 };

static int parse_count(const char* option, const char* text, int64_t most, int64_t* value) {
  char* end;
  errno = 0;
  const long long number = strtoll(text, &end, 10);
  if (end == text || *end != '\0' || errno != 0 || number < 1 || number > most) {
    fprintf(stderr, "c_engine: %s: expected a whole number from 1 to %lld, got '%s'\n", option, (long long)most, text);
    return 0;
  }
  *value = number;
  return 1;
}

static int parse_option(const char* option, const char* text, settings* chosen) {
  if (strcmp(option, "--tokens") == 0) return parse_count(option, text, MOST_TOKENS, &chosen->tokens);
  if (strcmp(option, "--threads") == 0) {
    int64_t threads;
    if (!parse_count(option, text, MOST_THREADS, &threads)) return 0;
    chosen->threads = (int)threads;
    return 1;
  }
  if (strcmp(option, "--device") == 0) {
    chosen->cuda = strcmp(text, "cuda") == 0;
    if (chosen->cuda || strcmp(text, "cpu") == 0) return 1;
    fprintf(stderr, "c_engine: --device: expected cpu or cuda, got '%s'\n", text);
    return 0;
  }
  char* end; /* --keep-ratio: whether it is a fraction is for the library to say */
  chosen->keep_ratio = strtod(text, &end);
  if (end != text && *end == '\0') return 1;
  fprintf(stderr, "c_engine: --keep-ratio: expected a number, got '%s'\n", text);
  return 0;
}

/* -1: go on. Anything else is the exit status. */
static int parse(int argc, char** argv, settings* chosen) {
  static const char* const known[] = {"--tokens", "--keep-ratio", "--threads", "--device"};
  for (int i = 1; i < argc; i += 2) {
    if (strcmp(argv[i], "--help") == 0) {
      fputs(usage, stdout);
      return 0;
    }
    int found = 0;
    for (int k = 0; k < 4; ++k) found |= strcmp(argv[i], known[k]) == 0;
    if (!found) {
      fprintf(stderr, "c_engine: unknown option '%s'\n%s", argv[i], usage);
      return 2;
    }
    if (i + 1 == argc) {
      fprintf(stderr, "c_engine: %s: expected a value behind it\n", argv[i]);
      return 2;
    }
    if (!parse_option(argv[i], argv[i + 1], chosen)) return 2;
  }
  return -1;
}

/* ---- what was kept ---- */

enum { COLUMNS = 64 };

/* A prompt from left to right: how important its tokens are, the darker the more, and what was kept of it. */
static void draw(const prompt_batch* prompts, const pruned_batch* pruned, int64_t b) {
  static const char shades[] = " .:-=+*#%@";
  const int64_t length = prompts->seq_lens[b], columns = length < COLUMNS ? length : COLUMNS;
  const float* importance = pruned->importance + b * prompts->max_len;
  float most[COLUMNS] = {0}, largest = 0;
  char kept[COLUMNS + 1];
  memset(kept, ' ', sizeof kept);
  kept[columns] = '\0';
  for (int64_t t = 0; t < length; ++t) {
    float* column = &most[t * columns / length];
    if (importance[t] > *column) *column = importance[t];
    if (importance[t] > largest) largest = importance[t];
  }
  for (int64_t i = 0; i < pruned->num_kept[b]; ++i) {
    kept[pruned->indices[b * pruned->width + i] * columns / length] = '^';
  }
  printf("  importance |");
  for (int64_t c = 0; c < columns; ++c) {
    const int shade = largest > 0 ? (int)(most[c] / largest * 9.999f) : 0;
    putchar(shades[shade]);
  }
  printf("|\n  kept       |%s|\n", kept);
}

static void print_spans(const int32_t* indices, int64_t count) {
  printf("  spans     ");
  for (int64_t i = 0, start = 0; i < count; ++i) {
    if (i + 1 < count && indices[i + 1] == indices[i] + 1) continue;
    printf(" %d-%d", indices[start], indices[i]);
    start = i + 1;
  }
  printf("\n");
}

static int is_kept(const pruned_batch* pruned, int64_t b, int64_t token) {
  for (int64_t i = 0; i < pruned->num_kept[b]; ++i) {
    if (pruned->indices[b * pruned->width + i] == token) return 1;
  }
  return 0;
}

/* Returns how many planted tokens are missing although the budget has room for all of them. */
static int print_facts(const prompt_batch* prompts, const pruned_batch* pruned, int64_t b) {
  const int64_t length = prompts->seq_lens[b];
  if (fact_position(length, 0) < 0) return 0;
  int missing = 0;
  for (int fact = 0; fact < FACTS; ++fact) {
    const int64_t start = fact_position(length, fact);
    int found = 0;
    for (int64_t t = start; t < start + FACT_TOKENS; ++t) found += is_kept(pruned, b, t);
    printf("  fact %d at %lld-%lld: %s\n", fact, (long long)start, (long long)start + FACT_TOKENS - 1,
           found == FACT_TOKENS ? "kept" : "NOT KEPT");
    missing += FACT_TOKENS - found;
  }
  /* A chunk each, beside the two that the protected tail may lie in. */
  return pruned->num_kept[b] >= (FACTS + 2) * CHUNK_TOKENS ? missing : 0;
}

static int print_pruned(const prompt_batch* prompts, const pruned_batch* pruned) {
  int missing = 0;
  for (int64_t b = 0; b < BATCH; ++b) {
    printf("prompt %lld: kept %d of %d tokens%s\n", (long long)b, pruned->num_kept[b], prompts->seq_lens[b],
           pruned->overflow[b] ? " (the protected tail alone is more than the budget)" : "");
    draw(prompts, pruned, b);
    print_spans(pruned->indices + b * pruned->width, pruned->num_kept[b]);
    missing += print_facts(prompts, pruned, b);
  }
  return missing;
}

/* ---- the program ---- */

static int prune(const prompt_batch* prompts, const settings* chosen, pruned_batch* pruned, failure* failed) {
#ifdef SPECPREFILL_HAVE_CUDA /* set where the library has CUDA kernels */
  if (chosen->cuda) return prune_cuda(prompts, chosen->keep_ratio, pruned, failed);
#endif
  return prune_cpu(prompts, chosen->keep_ratio, chosen->threads, pruned, failed);
}

/* "" where the device can be used. */
static const char* unavailable(const settings* chosen) {
  if (!chosen->cuda) return "";
#ifdef SPECPREFILL_HAVE_CUDA
  return specprefill_cuda_unavailable();
#else
  return "this program was built without CUDA";
#endif
}

/* Shows and checks the result; 0 where all of it is right. */
static int show(const prompt_batch* prompts, const pruned_batch* pruned, const settings* chosen) {
  if (chosen->cuda) {
    printf("specprefill %s, CUDA kernels\n", SPECPREFILL_VERSION);
  } else {
    printf("specprefill %s, CPU kernels for %s\n", SPECPREFILL_VERSION, specprefill_instruction_set());
  }
  const int missing = print_pruned(prompts, pruned);
  if (missing > 0) fprintf(stderr, "c_engine: %d planted tokens are missing\n", missing);
  const int wrong = missing + compare_with_reference(prompts, pruned, chosen->keep_ratio);
  printf("%s\n", wrong ? "FAILED" : "as the definition says: importance, selection, packed tokens, compacted cache");
  return wrong;
}

int main(int argc, char** argv) {
  settings chosen = {.tokens = 1000, .keep_ratio = 0.2, .threads = 2};
  const int done = parse(argc, argv, &chosen);
  if (done >= 0) return done;
  const char* reason = unavailable(&chosen);
  if (reason[0] != '\0') {
    fprintf(stderr, "c_engine: --device cuda: %s\n", reason);
    return 2;
  }

  /* How much room a selection needs follows from sizes and options; this is also where a bad ratio is refused. */
  const prompt_batch sizes = {.max_len = chosen.tokens};
  const specprefill_select select = select_arguments(&sizes, NULL, chosen.keep_ratio);
  const int64_t width = specprefill_select_width(&select);
  if (width < 0) {
    fprintf(stderr, "c_engine: specprefill_select_width: %s\n", specprefill_last_error());
    return 2;
  }

  prompt_batch prompts = make_prompts(chosen.tokens);
  pruned_batch pruned = make_pruned(chosen.tokens, width);
  failure failed = {"", ""};
  const int status = prune(&prompts, &chosen, &pruned, &failed);
  int exit_status = 1;
  if (status != SPECPREFILL_OK) {
    fprintf(stderr, "c_engine: %s: status %d: %s\n", failed.call, status, failed.reason);
  } else if (show(&prompts, &pruned, &chosen) == 0) {
    exit_status = 0;
  }
  free_prompts(&prompts);
  free_pruned(&pruned);
  return exit_status;
}
