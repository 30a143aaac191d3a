// One tile of a sequence's importance, for finalize and for select_tokens, which goes on with it while it is in L1.
#pragma once

#include <cstdint>
#include <vector>

#include "specprefill.h"

namespace specprefill {

constexpr int64_t kFinalizeTile = 4096;  // tokens, at most

class Finalizer {
 public:
  Finalizer(const specprefill_finalize& args, int num_threads);

  int check() const;  // lengths and row counts

  // Importance of tokens [start, stop) of sequence b, zeros behind the sequence's length; at most kFinalizeTile tokens.
  // False where the state is not finite. Tokens' values do not depend on the tile that they lie in.
  bool tile(int64_t b, int64_t start, int64_t stop, int worker);

  int report() const;  // which element of the state is not finite

 private:
  bool rows(int64_t b, int64_t start, int64_t count, int64_t length, float* row, float* out) const;
  bool read_row(const float* state, int64_t start, int64_t count, int64_t length, int64_t width, float* window,
                float* row) const;

  const specprefill_finalize& args_;
  int64_t width_, scratch_size_;
  std::vector<float> scratch_;
};

}  // namespace specprefill
