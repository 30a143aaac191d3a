// What the race detector remembers: who used a byte last, and what each thread knows of the others' past.
//
// Time is one counter for the whole launch, which every event that orders threads moves on. An access carries the time
// that its thread's clock shows; a thread knows of all accesses of another up to some time.
#pragma once

#include <array>
#include <memory>
#include <unordered_map>
#include <vector>

#include "emulation/grid.h"

namespace emulation {
namespace races {

using Time = uint32_t;

// A thread of the grid: number of the block, rank in it. The top bit says that the access was atomic.
using Who = uint32_t;
constexpr Who kAtomic = 1u << 31;
inline Who who_is(uint64_t block, unsigned rank) { return static_cast<Who>(block << 10 | rank) & ~kAtomic; }
inline uint32_t block_of(Who who) { return (who & ~kAtomic) >> 10; }
inline unsigned rank_of(Who who) { return who & 1023; }

// One access. Time 0: there was none. The code's address is kept relative to this module, to be small.
struct Access {
  Time time;
  Who who;
  int32_t where;
};

// The last accesses of a byte. Two readers are enough: a later writer races with one of them at least unless both of
// them are ordered before it, and then so, nearly always, is the rest.
struct Cell {
  Access write, reads[2];
};

// Times up to which accesses of whole blocks (exclusive) or single threads (inclusive) are known.
struct Knowledge {
  std::unordered_map<uint32_t, Time> blocks;
  std::unordered_map<Who, Time> threads;

  bool empty() const { return blocks.empty() && threads.empty(); }
  void clear() {
    blocks.clear();
    threads.clear();
  }
  void add(const Knowledge& other);
  void add_block(uint32_t block, Time before);
  void add_thread(Who who, Time until);
  bool holds(const Access& access) const;
};

struct ThreadPast {
  Time clock = 0;
  std::array<Time, 32> lanes{};           // of the warp: accesses up to these are known
  Time fenced = 0, fenced_for_block = 0;  // own accesses up to these are behind a fence
  Time fenced_base = 0;                   // accesses of the whole block before this are, through barriers
  bool unfenced_writes = false;
  Knowledge known;    // since the last barrier
  Knowledge pending;  // read from relaxed atomics: known after a fence
};

// Of one block.
struct History {
  Time base = 0;         // all accesses of the block before this are known to all of its threads
  Time fenced_base = 0;  // and before this, behind fences
  Knowledge known, pending;
  std::vector<ThreadPast> threads;
  std::vector<Cell> shared;
  std::vector<uint8_t> shared_state;  // of each byte
};

// The cells of global memory, made when it is first used.
class GlobalCells {
 public:
  Cell* find(uintptr_t address);
  void limit_size();

  static constexpr uintptr_t kPage = 4096;

 private:
  struct Page {
    Cell cells[kPage] = {};
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_ = nullptr;
};

}  // namespace races
}  // namespace emulation
