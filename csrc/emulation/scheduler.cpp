#include "emulation/scheduler.h"

#include <algorithm>
#include <new>

#include "emulation/races.h"

namespace emulation {

__thread const Place* place = nullptr;
__thread Thread* self = nullptr;

namespace {

#if defined(SPECPREFILL_ASAN) || defined(SPECPREFILL_EMULATION_RACES)
constexpr size_t kStackBytes = 256 << 10;  // instrumented functions need more
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
// Turns in a row in which every thread that ran only found that it must wait on. A wait that ends at all ends within as
// many turns as there are steps between the threads that depend on each other, which is far less.
constexpr int kIdleTurns = 1000;

[[noreturn]] void thread_main() {
  Thread& thread = *self;
  Grid& grid = *thread.block->grid;
  arrived(grid.scheduler);
  (*grid.thread)();
  if (!thread.copies.empty()) {
    // Legal, but never meant: either a wait is missing, or the copies were for nothing.
    fail("exits with %zu asynchronous copies that it never waited for", thread.copies.size());
  }
  thread.state = State::exited;
  change(thread.fiber, grid.scheduler, true);
  __builtin_unreachable();
}

}  // namespace

// ---- threads ----

Thread* ThreadPool::take() {
  if (free_.empty()) {
    Stack stack{new_stack(kStackBytes), nullptr};
    // A thread lies at the end of its own stack. Stacks of the same size end at the same offset in a page, and then
    // their busiest lines compete for the same places in the cache: spread them.
    const size_t spread = 64 * (stacks_.size() % 48);
    const size_t used = (sizeof(Thread) + 63) / 64 * 64 + spread;
    stack.thread = new (stack.memory + kStackBytes - used) Thread;
    stack.thread->fiber.stack = stack.memory;
    stack.thread->fiber.stack_bytes = kStackBytes - used;
    stacks_.push_back(stack);
    free_.push_back(stack.thread);
  }
  Thread* thread = free_.back();
  free_.pop_back();
  return thread;
}

ThreadPool::~ThreadPool() {
  for (const Stack& stack : stacks_) {
    stack.thread->~Thread();
    delete_stack(stack.memory, kStackBytes);
  }
}

// ---- blocks ----

void Scheduler::start_block(Grid& grid, uint64_t number) {
  if (idle_.empty()) idle_.push_back(std::make_unique<Block>());
  active_.push_back(std::move(idle_.back()));
  idle_.pop_back();
  Block& block = *active_.back();
  block.grid = &grid;
  block.number = number;
  const dim3& size = grid.size;
  block.index = {static_cast<unsigned>(number % size.x), static_cast<unsigned>(number / size.x % size.y),
                 static_cast<unsigned>(number / size.x / size.y)};
  block.live = grid.threads;
  block.in_barrier = 0;
  block.votes = 0;
  block.threads.resize(grid.threads);
  block.warps.resize((grid.threads + 31) / 32);
  const dim3& shape = grid.block_size;
  for (unsigned i = 0; i < grid.threads; ++i) {
    Thread& thread = *(block.threads[i] = pool_.take());
    thread.thread = {i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y};
    thread.block = &block;
    static_cast<Place&>(thread).block = block.index;
    thread.block_size = shape;
    thread.grid_size = size;
    thread.rank = i;
    thread.state = State::ready;
    thread.polls = 0;
    thread.copies.clear();
    thread.committed.clear();
    prepare(thread.fiber, thread_main);
  }
  for (unsigned w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.lanes = block.threads.data() + 32 * w;
    warp.size = std::min(32u, grid.threads - 32 * w);
    // Lanes that a partial warp does not have count as exited.
    warp.exited = warp.size == 32 ? 0 : ~0u << warp.size;
    warp.meetings.clear();
  }
  block.shared.start(grid.shared_bytes);
  races::start_block(block);
}

bool Scheduler::finish_block(Grid& grid, Block& block) {
  for (Thread* thread : block.threads) pool_.give_back(thread);
  ptrdiff_t written = 0;
  if (block.shared.finish(&written)) return true;
  grid.error = "block (" + std::to_string(block.index.x) + ", " + std::to_string(block.index.y) + ", " +
               std::to_string(block.index.z) + ") wrote to byte " + std::to_string(written) + " of its " +
               std::to_string(grid.shared_bytes) + " bytes of shared memory";
  return false;
}

// ---- turns ----

void Scheduler::resume(Grid& grid, Thread& thread) {
  thread.waits_for_others = false;
  thread.polls = 0;
  self = &thread;
  place = &thread;
  change(grid.scheduler, thread.fiber);
  self = nullptr;
  if (!grid.error.empty()) return;
  if (!thread.waits_for_others) grid.moved = true;
  if (thread.state != State::exited) return;
  Block& block = *thread.block;
  Warp& warp = block.warps[thread.rank / 32];
  --block.live;
  warp.exited |= 1u << thread.lane();
  // Others may have been waiting for this thread to come or to exit.
  leave_meetings(thread);
  finish_barrier_if_all_here(block);
}

bool Scheduler::take_turns(Grid& grid, Warp& warp) {
  Order::Kind kind = grid.order.kind;
  // As far as the warp gets; in random order sometimes less, so that warps meet in the middle of their work.
  uint32_t passes = ~0u;
  if (kind == Order::random && grid.random.below(2)) passes = 1 + grid.random.below(4);
  for (bool again = true; again && passes; --passes) {
    again = false;
    // Any first lane and any odd step visits all 32.
    const uint32_t dice = kind == Order::random ? static_cast<uint32_t>(grid.random.next() >> 32) : 0;
    const uint32_t first = kind == Order::reverse ? 31 : dice & 31;
    const uint32_t step = kind == Order::reverse ? 31 : (dice >> 5 & 31) | 1;
    for (uint32_t i = 0; i < 32; ++i) {
      const uint32_t lane = (first + i * step) & 31;
      if (lane >= warp.size) continue;
      Thread& thread = *warp.lanes[lane];
      if (thread.state != State::ready) continue;
      resume(grid, thread);
      if (!grid.error.empty()) return false;
      again = true;
    }
  }
  return true;
}

bool Scheduler::take_turns(Grid& grid, Block& block) {
  for (Thread* thread : block.threads) {
    if (thread->state == State::slept) thread->state = State::ready;
  }
  const auto warps = static_cast<uint32_t>(block.warps.size());
  warp_order_.resize(warps);
  for (uint32_t w = 0; w < warps; ++w) warp_order_[w] = grid.order.kind == Order::reverse ? warps - 1 - w : w;
  if (grid.order.kind == Order::random) {
    for (uint32_t w = warps; w > 1; --w) std::swap(warp_order_[w - 1], warp_order_[grid.random.below(w)]);
  }
  for (uint32_t w : warp_order_) {
    if (!take_turns(grid, block.warps[w])) return false;
  }
  return true;
}

bool Scheduler::some_can_go_on(const Block& block) const {
  return std::any_of(block.threads.begin(), block.threads.end(), [](const Thread* thread) {
    return thread->state == State::ready || thread->state == State::slept;
  });
}

// After a failure too: threads that have not exited are simply never resumed. Nothing is lost with them, as kernels own
// nothing.
void Scheduler::clear() {
  for (auto& block : active_) {
    ptrdiff_t written;
    block->shared.finish(&written);
    for (Thread* thread : block->threads) pool_.give_back(thread);
    idle_.push_back(std::move(block));
  }
  active_.clear();
  place = nullptr;
  self = nullptr;
  races::finish_grid();
}

bool Scheduler::run(Grid& grid, uint64_t resident) {
  races::start_grid();
  // How many blocks take turns. More than one only where blocks wait for each other, or by chance: a block that runs on
  // its own stays in the cache.
  uint64_t together = 1;
  if (grid.order.kind == Order::random) {
    together = grid.random.below(4) ? 1 + grid.random.below(4) : 1 + grid.random.below(static_cast<uint32_t>(resident));
  }
  uint64_t started = 0;
  int idle_turns = 0;
  while (true) {
    while (active_.size() < std::min(together, resident) && started < grid.blocks) {
      // A GPU starts blocks in an order that it does not promise.
      start_block(grid, grid.order.kind == Order::reverse ? grid.blocks - 1 - started : started);
      ++started;
    }
    if (active_.empty()) break;
    grid.moved = false;
    const size_t first =
        grid.order.kind == Order::random ? grid.random.below(static_cast<uint32_t>(active_.size())) : 0;
    for (size_t i = 0; i < active_.size(); ++i) {
      Block& block = *active_[(first + i) % active_.size()];
      if (!take_turns(grid, block)) break;
      if (block.live > 0 && !some_can_go_on(block)) {
        grid.error = "threads of a block wait for each other in different places. " + describe_waits(block);
        break;
      }
    }
    if (!grid.error.empty()) break;
    for (size_t i = 0; i < active_.size() && grid.error.empty();) {
      if (active_[i]->live > 0) {
        ++i;
        continue;
      }
      finish_block(grid, *active_[i]);
      idle_.push_back(std::move(active_[i]));
      active_.erase(active_.begin() + static_cast<ptrdiff_t>(i));
    }
    if (!grid.error.empty()) break;
    if (grid.moved) {
      idle_turns = 0;
    } else if (together < resident && started < grid.blocks) {
      together = active_.size() + 1;
    } else if (++idle_turns == kIdleTurns) {
      grid.error = "every thread that could go on polls memory, and nobody ends the wait";
      for (const auto& block : active_) grid.error += ". " + describe_waits(*block);
      break;
    }
  }
  clear();
  return grid.error.empty();
}

}  // namespace emulation
