// Chunk selection. Bytes: T fp32 in, the kept positions out; ranking is a selection in linear time, not a sort.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "common/guarded.h"
#include "common/parallel.h"
#include "common/sequences.h"
#include "common/status.h"
#include "select/check.h"

namespace specprefill {
namespace {

constexpr int64_t kBlock = 512;  // chunks that a thread reads at a time

long long ll(int64_t x) { return static_cast<long long>(x); }

int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

struct Chunk {
  double mass;
  float rank;  // larger is better
  int32_t index;
  bool forced;
};

// Forced chunks first, then by rank, ties to the lower index.
bool better(const Chunk& a, const Chunk& b) {
  if (a.forced != b.forced) return a.forced;
  if (a.rank != b.rank) return a.rank > b.rank;
  return a.index < b.index;
}

class Selector {
 public:
  Selector(const specprefill_select& args, int64_t b)
      : args_(args),
        b_(b),
        length_(length_of(args.seq_lens, b, args.max_len)),
        chunks_(static_cast<size_t>(ceil_div(length_, args.chunk_size))),
        kept_(chunks_.size(), 0) {}

  int64_t num_chunks() const { return static_cast<int64_t>(chunks_.size()); }

  // Sums, ranks and protection of the chunks [first, last). False when one has no rank.
  bool read(int64_t first, int64_t last) {
    bool ranked = true;
    for (int64_t c = first; c < last; ++c) ranked &= read(c);
    return ranked;
  }

  // Ranks the chunks and writes the kept tokens, once all are read.
  void choose() {
    const int64_t forced = std::count_if(chunks_.begin(), chunks_.end(), [](const Chunk& c) { return c.forced; });
    const int64_t budget = budget_chunks(args_, num_chunks());
    const bool by_mass = args_.budget == SPECPREFILL_KEEP_MASS;
    rank(std::max(by_mass ? mass_chunks() : budget, forced), by_mass);
    args_.overflow[b_] = !by_mass && forced > budget;
    write();
  }

  // Says which value has no rank.
  int reject() const {
    const float* importance = args_.importance + b_ * args_.importance_stride_batch;
    for (int64_t t = 0; t < length_; ++t) {
      const double x = importance[t * args_.importance_stride_token];
      if (!std::isfinite(x)) {
        return fail(SPECPREFILL_NOT_FINITE, "importance[%lld, %lld]: expected a finite value, got %g", ll(b_), ll(t),
                    x);
      }
      if (args_.budget == SPECPREFILL_KEEP_MASS && x < 0) {
        return fail(SPECPREFILL_INVALID_ARGUMENT,
                    "importance[%lld, %lld]: expected non-negative values with keep_mass, got %g", ll(b_), ll(t), x);
      }
    }
    return SPECPREFILL_OK;
  }

 private:
  bool read(int64_t c) {
    const int64_t start = c * args_.chunk_size, stop = start + std::min(args_.chunk_size, length_ - start);
    const float* importance = args_.importance + b_ * args_.importance_stride_batch;
    double sum = 0;
    float low = 0;
    for (int64_t t = start; t < stop; ++t) {
      const float x = importance[t * args_.importance_stride_token];
      sum += x;
      low = std::min(low, x);
    }
    if (!std::isfinite(sum) || (args_.budget == SPECPREFILL_KEEP_MASS && low < 0)) return false;
    bool forced = start < args_.sink || stop > length_ - args_.tail;
    if (args_.protect && !forced) {
      const uint8_t* protect = args_.protect + b_ * args_.protect_stride_batch;
      for (int64_t t = start; t < stop; ++t) forced |= protect[t * args_.protect_stride_token] != 0;
    }
    const double rank = args_.budget == SPECPREFILL_KEEP_MASS ? sum : sum / static_cast<double>(stop - start);
    chunks_[static_cast<size_t>(c)] = {sum, static_cast<float>(rank), static_cast<int32_t>(c), forced};
    return true;
  }

  // The fewest of the best chunks whose masses reach the wanted fraction. Leaves the chunks sorted, best first.
  int64_t mass_chunks() {
    double total = 0, held = 0;
    for (const Chunk& chunk : chunks_) total += chunk.mass;
    std::sort(chunks_.begin(), chunks_.end(), better);
    int64_t count = 0;
    for (const Chunk& chunk : chunks_) {
      held += chunk.mass;
      ++count;
      if (held >= (args_.keep - kMassSlack) * total) break;
    }
    return count;
  }

  // Marks the `keep` best chunks and puts all back into prompt order.
  void rank(int64_t keep, bool sorted) {
    if (!sorted && keep < static_cast<int64_t>(chunks_.size())) {
      std::nth_element(chunks_.begin(), chunks_.begin() + keep, chunks_.end(), better);
    }
    for (int64_t i = 0; i < keep; ++i) kept_[static_cast<size_t>(chunks_[static_cast<size_t>(i)].index)] = 1;
  }

  void write() const {
    int32_t* out = args_.indices + b_ * args_.width;
    int64_t count = 0;
    for (size_t c = 0; c < kept_.size(); ++c) {
      if (!kept_[c]) continue;
      const int64_t start = static_cast<int64_t>(c) * args_.chunk_size,
                    stop = start + std::min(args_.chunk_size, length_ - start);
      for (int64_t t = start; t < stop; ++t) out[count++] = static_cast<int32_t>(t);
    }
    std::fill(out + count, out + args_.width, -1);
    args_.num_kept[b_] = static_cast<int32_t>(count);
  }

  const specprefill_select& args_;
  int64_t b_, length_;
  std::vector<Chunk> chunks_;
  std::vector<char> kept_;
};

}  // namespace
}  // namespace specprefill

using namespace specprefill;

int specprefill_select_cpu(const specprefill_select* args, int num_threads) {
  return guarded("select_chunks", [&]() -> int {
    SPECPREFILL_REQUIRE(args, "args: expected a specprefill_select, got a null pointer");
    SPECPREFILL_TRY(check_select(*args));
    SPECPREFILL_TRY(check_lengths("seq_lens", args->seq_lens, args->batch, args->max_len));
    num_threads = clamp_threads(num_threads);
    std::vector<Selector> selectors;
    for (int64_t b = 0; b < args->batch; ++b) selectors.emplace_back(*args, b);
    std::vector<std::atomic<bool>> rejected(selectors.size());
    const int64_t blocks = ceil_div(ceil_div(args->max_len, args->chunk_size), kBlock);
    parallel_for(args->batch * blocks, num_threads, [&](int64_t task, int) {
      const size_t b = static_cast<size_t>(task / blocks);
      const int64_t first = task % blocks * kBlock, last = std::min(first + kBlock, selectors[b].num_chunks());
      if (!selectors[b].read(first, last)) rejected[b] = true;
    });
    for (size_t b = 0; b < selectors.size(); ++b) {
      if (rejected[b]) SPECPREFILL_TRY(selectors[b].reject());
    }
    parallel_for(args->batch, num_threads, [&](int64_t b, int) { selectors[static_cast<size_t>(b)].choose(); });
    return SPECPREFILL_OK;
  });
}
