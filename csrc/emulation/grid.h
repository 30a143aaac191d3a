// A grid that is running: its blocks, warps and threads, and who waits for what. For the emulator's own sources.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "emulation/cuda.h"
#include "emulation/fiber.h"
#include "emulation/random.h"
#include "emulation/settings.h"
#include "emulation/shared_block.h"

namespace emulation {

struct Block;
struct Grid;
struct Thread;

namespace races {
struct History;
}

enum class State : uint8_t {
  ready,
  slept,       // has given way: goes on in its block's next turn
  in_barrier,  // of the block
  in_warp,     // meets lanes of its warp
  exited
};

// What lanes meet for. All lanes of a meeting come for the same.
enum class Purpose : uint8_t { sync, shuffle, ballot, any, all, match, fold, mma_bf16, mma_f16 };
const char* name_of(Purpose purpose);
const char* name_of(Barrier kind);

// One lane's side of a meeting.
struct Call {
  Purpose purpose;
  Fold fold_kind;
  uint32_t mask;
  int source;
  uint64_t value, result;
  float* c;  // of an mma
  const uint32_t* a;
  uint32_t b[2];
};

// A copy that is on its way.
struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes;
};

struct Thread : Place {
  Fiber fiber;
  Block* block = nullptr;
  unsigned rank = 0;  // in its block
  State state = State::exited;
  bool waits_for_others = false;  // went to sleep because it could not go on
  Barrier barrier = Barrier::sync;
  unsigned polls = 0;  // atomics since its last turn that changed nothing
  Call call{};
  std::vector<Copy> copies;       // oldest first
  std::vector<size_t> committed;  // number of copies in each group

  unsigned lane() const { return rank % 32; }
};

// A meeting that some lanes still have to come to.
struct Meeting {
  Purpose purpose;
  Fold fold_kind;
  uint32_t mask, here;
};

struct Warp {
  Thread** lanes = nullptr;
  unsigned size = 0;  // threads: 32, or what is left of the block
  uint32_t exited = 0;
  std::vector<Meeting> meetings;
};

struct Block {
  Grid* grid = nullptr;
  uint3 index{};
  uint64_t number = 0;
  unsigned live = 0, in_barrier = 0;
  int votes = 0, vote_result = 0;
  unsigned voters = 0;              // that vote_result is of
  Barrier barrier = Barrier::sync;  // that in_barrier are in
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  SharedBlock shared;
  std::shared_ptr<races::History> history;  // where races are looked for
};

struct Grid {
  const std::function<void()>* thread = nullptr;
  dim3 size, block_size;
  uint64_t blocks = 0;
  unsigned threads = 0;  // of a block
  size_t shared_bytes = 0;
  Order order;
  Random random{0};
  Fiber scheduler;
  bool moved = false;  // some thread did more than wait since this was reset
  std::string error;
};

// The running thread. Null outside of a launch.
extern __thread Thread* self __attribute__((tls_model("initial-exec")));
// `what` may only be called in a kernel.
Thread& running(const char* what);

// Gives the running thread up in `state`; returns when it is its turn again.
void wait(State state);
// The running thread could not go on and lets others work. `waiting`: it has come no further itself.
void give_way(bool waiting);

// One more has come to the block's barrier, or there is one fewer to wait for.
void finish_barrier_if_all_here(Block& block);
// The thread has exited: others need not wait for it.
void leave_meetings(const Thread& thread);
// What an mma does, with all lanes in it.
void multiply(Warp& warp, Purpose type);

// "block (0, 0, 0), thread (5, 0, 0)"
std::string text(const Thread& thread);
// What the block's threads wait for, when they all do.
std::string describe_waits(const Block& block);

}  // namespace emulation
