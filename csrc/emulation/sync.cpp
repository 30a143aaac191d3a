#include "emulation/sync.h"

#include <cstdarg>
#include <cstdio>

#include "emulation/grid.h"
#include "emulation/races.h"

namespace emulation {

namespace {

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string hex(uint32_t mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

std::string describe_wait(const Thread& thread) {
  std::string where = "thread " + text(thread.thread);
  switch (thread.state) {
    case State::in_barrier: return where + " waits in " + name_of(thread.barrier);
    case State::in_warp: {
      const Warp& warp = thread.block->warps[thread.rank / 32];
      where += " waits in " + std::string(name_of(thread.call.purpose)) + " with mask " + hex(thread.call.mask);
      for (const Meeting& meeting : warp.meetings) {
        if (!(meeting.here >> thread.lane() & 1)) continue;
        where += " for lanes " + hex(meeting.mask & ~meeting.here & ~warp.exited) + " of its warp";
      }
      return where;
    }
    case State::slept: return where + " polls memory";
    case State::ready: return where + " is ready";
    case State::exited: return where + " has exited";
  }
  return where;
}

}  // namespace

const char* name_of(Barrier kind) {
  switch (kind) {
    case Barrier::sync: return "__syncthreads";
    case Barrier::vote_or: return "__syncthreads_or";
    case Barrier::vote_and: return "__syncthreads_and";
    case Barrier::vote_count: return "__syncthreads_count";
  }
  return "";
}

const char* name_of(Purpose purpose) {
  switch (purpose) {
    case Purpose::sync: return "__syncwarp";
    case Purpose::shuffle: return "a shuffle";
    case Purpose::ballot: return "__ballot_sync";
    case Purpose::any: return "__any_sync";
    case Purpose::all: return "__all_sync";
    case Purpose::match: return "__match_any_sync";
    case Purpose::fold: return "a __reduce_*_sync";
    case Purpose::mma_bf16: return "mma.sync (bf16)";
    case Purpose::mma_f16: return "mma.sync (f16)";
  }
  return "";
}

std::string text(const Thread& thread) {
  return "block " + text(static_cast<const Place&>(thread).block) + ", thread " + text(thread.thread);
}

std::string describe_waits(const Block& block) {
  std::string description = "block " + text(block.index) + ": ";
  // One thread for each kind of wait is enough to see what happened.
  struct Kind {
    State state;
    int what;
    uint32_t mask;
    unsigned count;
    const Thread* example;
  };
  std::vector<Kind> kinds;
  for (const Thread* thread : block.threads) {
    Kind kind{thread->state, 0, 0, 1, thread};
    if (kind.state == State::in_barrier) kind.what = static_cast<int>(thread->barrier);
    if (kind.state == State::in_warp) {
      kind.what = static_cast<int>(thread->call.purpose);
      kind.mask = thread->call.mask;
    }
    bool found = false;
    for (Kind& other : kinds) {
      if (other.state != kind.state || other.what != kind.what || other.mask != kind.mask) continue;
      ++other.count;
      found = true;
      break;
    }
    if (!found && kinds.size() < 8) kinds.push_back(kind);
  }
  for (size_t i = 0; i < kinds.size(); ++i) {
    if (i) description += "; ";
    description += describe_wait(*kinds[i].example);
    if (kinds[i].count > 1) description += " (and " + std::to_string(kinds[i].count - 1) + " more likewise)";
  }
  return description;
}

Thread& running(const char* what) {
  if (!self) {
    std::fprintf(stderr, "%s is called outside of a kernel\n", what);
    __builtin_trap();
  }
  return *self;
}

void fail(const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  Thread& thread = running(message);
  Grid& grid = *thread.block->grid;
  if (grid.error.empty()) grid.error = text(thread) + " " + message;
  change(thread.fiber, grid.scheduler, true);
  __builtin_unreachable();
}

void wait(State state) {
  Thread& thread = *self;
  thread.state = state;
  change(thread.fiber, thread.block->grid->scheduler);
}

void give_way(bool waiting) {
  self->waits_for_others = waiting;
  wait(State::slept);
}

void sleep() {
  running("__nanosleep");
  give_way(true);
}

void fence(bool block_only) {
  running("__threadfence");
  races::fence(block_only);
}

void finish_barrier_if_all_here(Block& block) {
  if (block.in_barrier == 0 || block.in_barrier < block.live) return;
  block.vote_result = block.votes;
  block.voters = block.in_barrier;
  block.votes = 0;
  block.in_barrier = 0;
  races::block_barrier(block);
  for (Thread* thread : block.threads) {
    if (thread->state == State::in_barrier) thread->state = State::ready;
  }
}

int block_barrier(Barrier kind, int predicate) {
  Thread& thread = running("__syncthreads");
  Block& block = *thread.block;
  if (block.in_barrier > 0 && block.barrier != kind) {
    fail("comes to %s while other threads wait in %s", name_of(kind), name_of(block.barrier));
  }
  block.barrier = kind;
  thread.barrier = kind;
  block.votes += predicate != 0;
  ++block.in_barrier;
  thread.state = State::in_barrier;
  finish_barrier_if_all_here(block);
  if (thread.state == State::in_barrier) wait(State::in_barrier);
  const int votes = block.vote_result;
  switch (kind) {
    case Barrier::sync: return 0;
    case Barrier::vote_or: return votes > 0;
    case Barrier::vote_and: return votes == static_cast<int>(block.voters);
    case Barrier::vote_count: return votes;
  }
  return 0;
}

}  // namespace emulation
