#include "emulation/races.h"

#if defined(SPECPREFILL_EMULATION_RACES)

#include <algorithm>
#include <string>

#include "emulation/history.h"
#include "emulation/source_line.h"

namespace emulation {
namespace races {

namespace {

enum SharedState : uint8_t { kUnwritten, kWritten, kOnItsWay };

struct Detector {
  Time now = 1;
  Time launch = 1;
  GlobalCells global;
  std::unordered_map<uintptr_t, Knowledge> published;  // by stores and updates of an atomic
};

thread_local Detector detector;

// Addresses of code are kept as distances from here.
int32_t packed(const void* where) {
  return static_cast<int32_t>(reinterpret_cast<intptr_t>(where) - reinterpret_cast<intptr_t>(&packed));
}
const void* unpacked(int32_t where) {
  return reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(&packed) + where);
}

History& history() { return *self->block->history; }
ThreadPast& past() { return history().threads[self->rank]; }
Who me() { return who_is(self->block->number, self->rank); }

// Whether the running thread knows of an access.
bool knows(const Access& access, bool in_shared) {
  History& block = history();
  if (access.time < (in_shared ? block.base : detector.launch)) return true;
  const Who who = access.who & ~kAtomic;
  if (who == me()) return true;
  const ThreadPast& thread = block.threads[self->rank];
  if (block_of(who) == block_of(me())) {
    if (access.time < block.base) return true;
    if (rank_of(who) / 32 == self->rank / 32 && access.time <= thread.lanes[rank_of(who) % 32]) return true;
  }
  return thread.known.holds(access) || block.known.holds(access);
}

struct Use {
  const char* verb;
  bool writes, atomic;
};

std::string place_of(uintptr_t address, bool in_shared) {
  if (!in_shared) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%#zx", static_cast<size_t>(address));
    return std::string("global memory at ") + digits;
  }
  return "byte " + std::to_string(address - reinterpret_cast<uintptr_t>(self->block->shared.data())) +
         " of shared memory";
}

std::string name_of(Who who) {
  const Grid& grid = *self->block->grid;
  const dim3 &size = grid.size, &shape = grid.block_size;
  const unsigned rank = rank_of(who), block = block_of(who);
  const auto text = [](unsigned x, unsigned y, unsigned z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
  };
  std::string name = "thread " + text(rank % shape.x, rank / shape.x % shape.y, rank / shape.x / shape.y);
  if (block == block_of(me())) return name;
  return name + " of block " + text(block % size.x, block / size.x % size.y, block / size.x / size.y);
}

[[noreturn]] void report(const Use& use, const Access& other, const char* other_verb, uintptr_t address, bool in_shared,
                         const void* where) {
  const std::string what = std::string(use.atomic ? "atomically " : "") + use.verb;
  const std::string others = std::string(other.who & kAtomic ? "atomically " : "") + other_verb;
  fail("%s %s at %s; %s %s it at %s, and nothing orders the two", what.c_str(), place_of(address, in_shared).c_str(),
       source_line(where).c_str(), name_of(other.who).c_str(), others.c_str(),
       source_line(unpacked(other.where)).c_str());
}

void check(Cell& cell, const Use& use, uintptr_t address, bool in_shared, const void* where) {
  const Access access{past().clock, me() | (use.atomic ? kAtomic : 0), packed(where)};
  const auto conflicts = [&](const Access& other) {
    return other.time && !(use.atomic && (other.who & kAtomic)) && !knows(other, in_shared);
  };
  if (conflicts(cell.write)) report(use, cell.write, "writes", address, in_shared, where);
  if (use.writes) {
    for (const Access& read : cell.reads) {
      if (conflicts(read)) report(use, read, "reads", address, in_shared, where);
    }
    cell.write = access;
    return;
  }
  // The first reader stays until it is known to all who could come, and the last one changes.
  Access& first = cell.reads[0];
  if (!first.time || (first.who & ~kAtomic) == me() || knows(first, in_shared)) {
    first = access;
  } else {
    cell.reads[1] = access;
  }
}

void use(const void* pointer, size_t bytes, const Use& use, const void* where) {
  Thread& thread = *self;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto stack = reinterpret_cast<uintptr_t>(thread.fiber.stack);
  if (address - stack < reinterpret_cast<uintptr_t>(&thread + 1) - stack) return;
  if (pointer == &place) return;
  const SharedBlock& shared = thread.block->shared;
  if (shared.near(pointer)) {
    const ptrdiff_t offset = static_cast<const unsigned char*>(pointer) - shared.data();
    if (!shared.contains(pointer, bytes)) {
      fail("%s %zu bytes at byte %td of its %zu bytes of shared memory at %s", use.verb, bytes, offset, shared.size(),
           source_line(where).c_str());
    }
    History& block = history();
    for (size_t i = 0; i < bytes; ++i) {
      uint8_t& state = block.shared_state[static_cast<size_t>(offset) + i];
      if (state == kOnItsWay) {
        fail("%s byte %td of shared memory at %s, where an asynchronous copy is on its way", use.verb,
             offset + static_cast<ptrdiff_t>(i), source_line(where).c_str());
      }
      if (state == kUnwritten && (!use.writes || use.atomic)) {
        fail("%s byte %td of shared memory at %s, which nobody has written", use.verb,
             offset + static_cast<ptrdiff_t>(i), source_line(where).c_str());
      }
      if (use.writes) state = kWritten;
      check(block.shared[static_cast<size_t>(offset) + i], use, address + i, true, where);
    }
    return;
  }
  if (use.writes && !use.atomic) past().unfenced_writes = true;
  for (size_t i = 0; i < bytes; ++i) check(*detector.global.find(address + i), use, address + i, false, where);
}

// ---- what atomics tell other threads ----

void publish(const void* address, bool release) {
  History& block = history();
  ThreadPast& thread = past();
  const bool in_shared = self->block->shared.near(address);
  const Time base = release ? block.base : std::max(block.fenced_base, thread.fenced_base);
  const Time own = release     ? thread.clock
                   : in_shared ? std::max(thread.fenced, thread.fenced_for_block)
                               : thread.fenced;
  const bool tells_own = own >= block.base;  // what is older is in `base`
  if (in_shared && !tells_own) return;       // counters of a block, with barriers around them
  Knowledge& told = detector.published[reinterpret_cast<uintptr_t>(address)];
  told.add_block(block_of(me()), base);
  told.add(block.known);
  told.add(thread.known);
  if (!tells_own) return;
  told.add_thread(me(), own);
  const Who first = me() & ~31u;
  for (Who lane = 0; lane < 32; ++lane) {
    if (thread.lanes[lane] >= block.base) told.add_thread(first + lane, thread.lanes[lane]);
  }
  // What the thread does from here on, it has not told.
  thread.clock = ++detector.now;
}

void learn(const void* address, bool acquire) {
  const auto told = detector.published.find(reinterpret_cast<uintptr_t>(address));
  if (told == detector.published.end()) return;
  ThreadPast& thread = past();
  const bool now = acquire || self->block->shared.near(address);
  (now ? thread.known : thread.pending).add(told->second);
}

}  // namespace

// ---- events ----

void start_grid() {
  Detector& d = detector;
  if (d.now > 3u << 30) {
    // Times would soon start over. Between launches nobody needs them.
    d = Detector();
  }
  d.launch = ++d.now;
  d.global.limit_size();
  d.published.clear();
}

void finish_grid() {}

void start_block(Block& block) {
  if (!block.history) block.history = std::make_shared<History>();
  History& history = *block.history;
  const Time now = ++detector.now;
  history.base = history.fenced_base = now;
  history.known.clear();
  history.pending.clear();
  history.threads.resize(block.threads.size());
  for (ThreadPast& thread : history.threads) {
    thread.clock = now;
    thread.lanes.fill(0);
    thread.fenced = thread.fenced_for_block = thread.fenced_base = 0;
    thread.unfenced_writes = false;
    thread.known.clear();
    thread.pending.clear();
  }
  // Cells of an earlier block are older than this one's base.
  if (history.shared.size() < block.shared.size()) history.shared.resize(block.shared.size(), Cell{});
  history.shared_state.assign(block.shared.size(), kUnwritten);
}

void block_barrier(Block& block) {
  History& history = *block.history;
  history.base = ++detector.now;
  bool fenced = true;
  for (ThreadPast& thread : history.threads) {
    thread.clock = history.base;
    fenced = fenced && !thread.unfenced_writes;
    if (!thread.known.empty()) {
      history.known.add(thread.known);
      thread.known.clear();
    }
    if (!thread.pending.empty()) {
      history.pending.add(thread.pending);
      thread.pending.clear();
    }
  }
  if (fenced) history.fenced_base = history.base;
}

void warp_barrier(Warp& warp, uint32_t lanes) {
  History& history = *warp.lanes[0]->block->history;
  std::array<Time, 32> joined{};
  Knowledge known, pending;
  ThreadPast* threads = &history.threads[warp.lanes[0]->rank];
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    ThreadPast& thread = threads[__builtin_ctz(rest)];
    thread.lanes[__builtin_ctz(rest)] = thread.clock;
    for (int i = 0; i < 32; ++i) joined[i] = std::max(joined[i], thread.lanes[i]);
    known.add(thread.known);
    pending.add(thread.pending);
  }
  const Time now = ++detector.now;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    ThreadPast& thread = threads[__builtin_ctz(rest)];
    thread.lanes = joined;
    thread.clock = now;
    if (!known.empty()) thread.known = known;
    if (!pending.empty()) thread.pending = pending;
  }
}

void fence(bool block_only) {
  History& block = history();
  ThreadPast& thread = past();
  thread.fenced_for_block = thread.clock;
  if (!block_only) {
    thread.fenced = thread.clock;
    thread.fenced_base = block.base;
    thread.unfenced_writes = false;
    thread.known.add(thread.pending);
    thread.known.add(block.pending);
    thread.pending.clear();
  }
  thread.clock = ++detector.now;
}

void read(const void* address, size_t bytes, const void* where) {
  if (self) use(address, bytes, {"reads", false, false}, where);
}

void write(const void* address, size_t bytes, const void* where) {
  if (self) use(address, bytes, {"writes", true, false}, where);
}

void atomic(const void* address, size_t bytes, Atomic kind, const void* where) {
  if (!self) return;
  const bool loads = kind == Atomic::relaxed_load || kind == Atomic::load_acquire;
  const bool stores = kind == Atomic::relaxed_store || kind == Atomic::store_release;
  use(address, bytes, {loads ? "reads" : "writes", !loads, true}, where);
  if (!stores) learn(address, kind == Atomic::load_acquire);
  if (!loads) publish(address, kind == Atomic::store_release);
}

void start_copy(const void* to, const void* from, size_t bytes, const void* where) {
  if (bytes) use(from, bytes, {"reads", false, false}, where);
  use(to, 16, {"writes", true, false}, where);
  const auto offset = static_cast<const unsigned char*>(to) - self->block->shared.data();
  std::fill_n(history().shared_state.begin() + offset, 16, static_cast<uint8_t>(kOnItsWay));
}

void finish_copy(const void* to, const void* from, size_t bytes, const void* where) {
  const auto offset = static_cast<const unsigned char*>(to) - self->block->shared.data();
  std::fill_n(history().shared_state.begin() + offset, 16, static_cast<uint8_t>(kWritten));
  if (bytes) use(from, bytes, {"reads", false, false}, where);
  use(to, 16, {"writes", true, false}, where);
}

}  // namespace races
}  // namespace emulation

#endif
