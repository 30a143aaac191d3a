#include "emulation/warp.h"

#include "emulation/grid.h"
#include "emulation/races.h"
#include "emulation/sync.h"

namespace emulation {

namespace {

// What a lane reads of one that does not take part: CUDA leaves it undefined. NaN as a float, no index as an integer.
constexpr uint64_t kUndefined = 0x7fc0dead7fc0deadull;

int64_t folded(Fold kind, int64_t a, int64_t b) {
  switch (kind) {
    case Fold::add: return a + b;
    case Fold::min: return a < b ? a : b;
    case Fold::max: return a < b ? b : a;
    case Fold::bit_and: return a & b;
    case Fold::bit_or: return a | b;
    case Fold::bit_xor: return a ^ b;
  }
  return 0;
}

// All who come are here: results for each of them.
void finish(Warp& warp, Purpose purpose, Fold fold_kind, uint32_t here) {
  uint32_t votes = 0;
  int64_t sum = 0;
  bool first = true;
  switch (purpose) {
    case Purpose::sync: races::warp_barrier(warp, here); break;
    case Purpose::shuffle: break;
    case Purpose::ballot:
    case Purpose::any:
    case Purpose::all:
      for (uint32_t rest = here; rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        votes |= static_cast<uint32_t>(warp.lanes[lane]->call.value) << lane;
      }
      break;
    case Purpose::match: break;
    case Purpose::fold:
      for (uint32_t rest = here; rest; rest &= rest - 1) {
        const auto value = static_cast<int64_t>(warp.lanes[__builtin_ctz(rest)]->call.value);
        sum = first ? value : folded(fold_kind, sum, value);
        first = false;
      }
      break;
    case Purpose::mma_bf16:
    case Purpose::mma_f16: multiply(warp, purpose); break;
  }
  for (uint32_t rest = here; rest; rest &= rest - 1) {
    Thread& thread = *warp.lanes[__builtin_ctz(rest)];
    Call& call = thread.call;
    switch (purpose) {
      case Purpose::shuffle:
        call.result = here >> call.source & 1 ? warp.lanes[call.source]->call.value : kUndefined;
        break;
      case Purpose::ballot: call.result = votes; break;
      case Purpose::any: call.result = votes != 0; break;
      case Purpose::all: call.result = votes == here; break;
      case Purpose::fold: call.result = static_cast<uint64_t>(sum); break;
      case Purpose::match:
        call.result = 0;
        for (uint32_t others = here; others; others &= others - 1) {
          const int lane = __builtin_ctz(others);
          if (warp.lanes[lane]->call.value == call.value) call.result |= 1u << lane;
        }
        break;
      default: break;
    }
    thread.state = State::ready;
  }
}

// The calling thread's `call` is filled in but for `mask`.
void meet(Thread& thread, Purpose purpose, uint32_t mask) {
  Call& call = thread.call;
  call.purpose = purpose;
  call.mask = mask;
  if (purpose != Purpose::fold) call.fold_kind = Fold::add;
  Warp& warp = thread.block->warps[thread.rank / 32];
  const uint32_t me = 1u << thread.lane();
  if (!(mask & me)) {
    fail("(lane %u of its warp) calls %s with mask 0x%08x, which it is not in", thread.lane(), name_of(purpose), mask);
  }
  size_t i = 0;
  while (i < warp.meetings.size()) {
    const Meeting& other = warp.meetings[i];
    if (other.purpose == purpose && other.mask == mask && other.fold_kind == call.fold_kind) break;
    ++i;
  }
  uint32_t here = me;
  if (i < warp.meetings.size()) here |= warp.meetings[i].here;
  if (mask & ~here & ~warp.exited) {
    if (i == warp.meetings.size()) warp.meetings.push_back({purpose, call.fold_kind, mask, 0});
    warp.meetings[i].here = here;
    wait(State::in_warp);
    return;
  }
  if (i < warp.meetings.size()) warp.meetings.erase(warp.meetings.begin() + static_cast<ptrdiff_t>(i));
  finish(warp, purpose, call.fold_kind, here);
}

}  // namespace

void leave_meetings(const Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.rank / 32];
  for (size_t i = 0; i < warp.meetings.size();) {
    const Meeting meeting = warp.meetings[i];
    if (!(meeting.mask >> thread.lane() & 1) || (meeting.mask & ~meeting.here & ~warp.exited)) {
      ++i;
      continue;
    }
    if (meeting.purpose == Purpose::mma_bf16 || meeting.purpose == Purpose::mma_f16) {
      block.grid->error =
          text(thread) + " exits while its warp calls " + name_of(meeting.purpose) + ", which needs all 32 lanes";
      return;
    }
    warp.meetings.erase(warp.meetings.begin() + static_cast<ptrdiff_t>(i));
    finish(warp, meeting.purpose, meeting.fold_kind, meeting.here);
  }
}

int lane() { return static_cast<int>(running("a warp function").lane()); }

void check_width(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("shuffles with width %d: not a power of two up to 32", width);
}

void warp_barrier(uint32_t mask) { meet(running("__syncwarp"), Purpose::sync, mask); }

uint64_t shuffle(uint32_t mask, uint64_t bits, int source) {
  Thread& thread = running("a shuffle");
  thread.call.value = bits;
  thread.call.source = source & 31;
  meet(thread, Purpose::shuffle, mask);
  return thread.call.result;
}

uint32_t vote(Vote kind, uint32_t mask, bool predicate) {
  Thread& thread = running("a vote");
  thread.call.value = predicate;
  meet(thread, kind == Vote::ballot ? Purpose::ballot : kind == Vote::any ? Purpose::any : Purpose::all, mask);
  return static_cast<uint32_t>(thread.call.result);
}

int64_t fold(Fold kind, uint32_t mask, int64_t value) {
  Thread& thread = running("a reduction");
  thread.call.value = static_cast<uint64_t>(value);
  thread.call.fold_kind = kind;
  meet(thread, Purpose::fold, mask);
  return static_cast<int64_t>(thread.call.result);
}

uint32_t match(uint32_t mask, uint64_t bits) {
  Thread& thread = running("__match_any_sync");
  thread.call.value = bits;
  meet(thread, Purpose::match, mask);
  return static_cast<uint32_t>(thread.call.result);
}

namespace {

void mma(Purpose type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Thread& thread = running("mma");
  const Warp& warp = thread.block->warps[thread.rank / 32];
  if (warp.exited) fail("calls %s, which needs all 32 lanes: 0x%08x have exited", name_of(type), warp.exited);
  thread.call.c = c;
  thread.call.a = a;
  thread.call.b[0] = b0;
  thread.call.b[1] = b1;
  meet(thread, type, 0xffffffffu);
}

}  // namespace

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma(Purpose::mma_bf16, c, a, b0, b1); }
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma(Purpose::mma_f16, c, a, b0, b1); }

}  // namespace emulation
