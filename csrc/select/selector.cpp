#include "select/selector.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/processor.h"
#include "common/sequences.h"
#include "common/status.h"
#include "select/check.h"
#include "select/cpu_kernels.h"
#include "select/rank.h"

namespace specprefill {
namespace {

long long ll(int64_t x) { return static_cast<long long>(x); }

}  // namespace

const SelectKernels& select_kernels() { return SPECPREFILL_PICK(select_kernels); }

Selector::Selector(const specprefill_select& args, int64_t b)
    : args_(args),
      b_(b),
      length_(length_of(args.seq_lens, b, args.max_len)),
      num_chunks_((length_ - 1) / args.chunk_size + 1),
      keys_(static_cast<size_t>(num_chunks_)),
      spare_(keys_.size()),
      masses_(by_mass() ? keys_.size() : 0),
      order_(masses_.size()) {
  if (args.importance_stride_token != 1) row_.resize(static_cast<size_t>(length_));
  for (int64_t t = 0; t < static_cast<int64_t>(row_.size()); ++t) row_[static_cast<size_t>(t)] = importance(t);
}

float Selector::importance(int64_t t) const {
  return args_.importance[b_ * args_.importance_stride_batch + t * args_.importance_stride_token];
}

int64_t Selector::stop(int64_t c) const { return start(c) + std::min(args_.chunk_size, length_ - start(c)); }

bool Selector::read(int64_t first, int64_t last) {
  double sums[kChunks];
  const float* x = row_.empty() ? args_.importance + b_ * args_.importance_stride_batch : row_.data();
  const int64_t whole = std::min(last, length_ / args_.chunk_size);  // then the short last one
  select_kernels().chunk_sums(x + start(first), whole - first, args_.chunk_size, sums);
  if (whole < last) select_kernels().chunk_sums(x + start(whole), 1, length_ - start(whole), sums + (whole - first));
  bool ranked = true;
  for (int64_t c = first; c < last; ++c) {
    const double sum = sums[c - first];
    ranked &= std::isfinite(sum) && !(by_mass() && has_negative(c));
    const double rank = by_mass() ? sum : sum / static_cast<double>(stop(c) - start(c));
    keys_[static_cast<size_t>(c)] = protects(c) ? kForced : rank_key(static_cast<float>(rank));
    if (by_mass()) masses_[static_cast<size_t>(c)] = sum;
  }
  return ranked;
}

bool Selector::has_negative(int64_t c) const {
  float low = 0;
  for (int64_t t = start(c); t < stop(c); ++t) low = std::min(low, importance(t));
  return low < 0;
}

bool Selector::protects(int64_t c) const {
  bool forced = start(c) < args_.sink || stop(c) > length_ - args_.tail;
  if (args_.protect && !forced) {
    const uint8_t* protect = args_.protect + b_ * args_.protect_stride_batch;
    for (int64_t t = start(c); t < stop(c); ++t) forced |= protect[t * args_.protect_stride_token] != 0;
  }
  return forced;
}

void Selector::choose() {
  const int64_t forced = std::count(keys_.begin(), keys_.end(), kForced);
  const int64_t budget = budget_chunks(args_, num_chunks_);
  args_.overflow[b_] = !by_mass() && forced > budget;
  write(std::max(by_mass() ? mass_chunks() : budget, forced));
}

// The fewest of the best chunks whose masses reach the wanted fraction.
int64_t Selector::mass_chunks() {
  double total = 0, held = 0;
  for (double mass : masses_) total += mass;
  // Forced chunks first, then by rank, ties to the lower index; forced ones too are taken by rank.
  std::iota(order_.begin(), order_.end(), 0);
  std::sort(order_.begin(), order_.end(), [this](int32_t one, int32_t other) {
    const size_t a = static_cast<size_t>(one), b = static_cast<size_t>(other);
    if (keys_[a] != keys_[b]) return keys_[a] > keys_[b];
    const float rank_a = static_cast<float>(masses_[a]), rank_b = static_cast<float>(masses_[b]);
    return rank_a != rank_b ? rank_a > rank_b : a < b;
  });
  int64_t count = 0;
  for (int32_t c : order_) {
    held += masses_[static_cast<size_t>(c)];
    ++count;
    if (held >= (args_.keep - kMassSlack) * total) break;
  }
  return count;
}

// The tokens of the `keep` best chunks, in prompt order; of equal ones at the end, those that come first.
void Selector::write(int64_t keep) {
  const uint32_t least = kth_largest(keys_, keep, spare_);
  int64_t ties = keep - std::count_if(keys_.begin(), keys_.end(), [least](uint32_t key) { return key > least; });
  int32_t* out = args_.indices + b_ * args_.width;
  int32_t* const begin = out;
  for (int64_t c = 0; c < num_chunks_; ++c) {
    const uint32_t key = keys_[static_cast<size_t>(c)];
    if (key < least || (key == least && ties-- <= 0)) continue;
    const int64_t count = stop(c) - start(c);
    std::iota(out, out + count, static_cast<int32_t>(start(c)));
    out += count;
  }
  args_.num_kept[b_] = static_cast<int32_t>(out - begin);
  std::fill(out, begin + args_.width, -1);
}

int Selector::reject() const {
  for (int64_t t = 0; t < length_; ++t) {
    const double x = importance(t);
    if (!std::isfinite(x)) {
      return fail(SPECPREFILL_NOT_FINITE, "importance[%lld, %lld]: expected a finite value, got %g", ll(b_), ll(t), x);
    }
    if (by_mass() && x < 0) {
      return fail(SPECPREFILL_INVALID_ARGUMENT,
                  "importance[%lld, %lld]: expected non-negative values with keep_mass, got %g", ll(b_), ll(t), x);
    }
  }
  return SPECPREFILL_OK;
}

}  // namespace specprefill
