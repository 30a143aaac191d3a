/* usage: specprefill_check [cases [seed [callers]]]; several callers run the same cases at the same time. */
#include <pthread.h>
#include <stdio.h>

#include "check.h"

static struct {
  int64_t cases, seed;
} options = {200, 1};

enum { CHECKS = 6 };

static void* run_cases(void* failures) {
  static int (*const checks[])(random_source*) = {check_score,         check_finalize,  check_select,
                                                  check_gather_tokens, check_gather_kv, check_select_tokens};
  static const char* const names[] = {"score", "finalize", "select", "gather_tokens", "gather_kv", "select_tokens"};
  for (int64_t i = 0; i < options.cases; ++i) {
    for (int which = 0; which < CHECKS; ++which) {
      random_source source = {(uint64_t)((options.seed + i) * CHECKS + which) << 20};
      if (checks[which](&source)) {
        fprintf(stderr, "  in %s; again with: specprefill_check 1 %lld\n", names[which], (long long)(options.seed + i));
        ++*(int64_t*)failures;
      }
    }
  }
  return NULL;
}

int main(int argc, char** argv) {
  if (argc > 1) options.cases = atoll(argv[1]);
  if (argc > 2) options.seed = atoll(argv[2]);
  const int callers = argc > 3 ? atoi(argv[3]) : 1;
  int64_t failures[16] = {0}, failed = 0;
  failed +=
      check_score_errors() + check_finalize_errors() + check_select_errors() + check_gather_errors() + check_cuda();
  pthread_t threads[16];
  if (callers < 1 || callers > 16) return report("callers: expected 1 to 16, got %d", callers);
  for (int i = 0; i < callers; ++i) {
    if (pthread_create(&threads[i], NULL, run_cases, &failures[i])) return report("no thread to be had");
  }
  for (int i = 0; i < callers; ++i) {
    pthread_join(threads[i], NULL);
    failed += failures[i];
  }
  printf("instruction set %s%s: %lld cases of each op by %d caller(s), %lld failed\n", specprefill_instruction_set(),
         cuda_is_emulated() ? " and emulated CUDA" : "", (long long)options.cases, callers, (long long)failed);
  return failed ? 1 : 0;
}
