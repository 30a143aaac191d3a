// The chunks of one sequence and which of them are kept, for select_chunks and for select_tokens, which reads each
// chunk while its importance is in L1.
#pragma once

#include <cstdint>
#include <vector>

#include "specprefill.h"

namespace specprefill {

class Selector {
 public:
  Selector(const specprefill_select& args, int64_t b);

  int64_t num_chunks() const { return num_chunks_; }

  // Sums, ranks and protection of the chunks [first, last), at most kChunks of them: any number of threads may read
  // different ones. False when one has no rank. Neither this nor `choose` allocates or throws.
  bool read(int64_t first, int64_t last);

  // Ranks the chunks and writes the kept tokens, once all are read.
  void choose();

  int reject() const;  // says which value has no rank

  static constexpr int64_t kChunks = 512;

 private:
  int64_t start(int64_t c) const { return c * args_.chunk_size; }
  int64_t stop(int64_t c) const;
  bool by_mass() const { return args_.budget == SPECPREFILL_KEEP_MASS; }
  float importance(int64_t t) const;
  bool protects(int64_t c) const;
  bool has_negative(int64_t c) const;
  int64_t mass_chunks();
  void write(int64_t keep);

  const specprefill_select& args_;
  int64_t b_, length_, num_chunks_;
  std::vector<float> row_;              // importance side by side, where it does not lie so
  std::vector<uint32_t> keys_, spare_;  // larger is better; protected chunks have the largest
  std::vector<double> masses_;          // for a budget by mass alone
  std::vector<int32_t> order_;          // as well
};

}  // namespace specprefill
