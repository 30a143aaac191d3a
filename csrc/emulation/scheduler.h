// Runs a grid: starts blocks as others finish, and gives their threads turns until all have exited or none can go on.
#pragma once

#include <memory>
#include <vector>

#include "emulation/grid.h"

namespace emulation {

// Threads and their stacks, kept from launch to launch.
class ThreadPool {
 public:
  ThreadPool() = default;
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool();

  Thread* take();
  void give_back(Thread* thread) { free_.push_back(thread); }

 private:
  struct Stack {
    unsigned char* memory;
    Thread* thread;
  };
  std::vector<Stack> stacks_;
  std::vector<Thread*> free_;
};

class Scheduler {
 public:
  // False: it failed, and grid.error says how. `resident`: blocks that may run at a time.
  bool run(Grid& grid, uint64_t resident);

 private:
  void start_block(Grid& grid, uint64_t number);
  bool finish_block(Grid& grid, Block& block);
  bool take_turns(Grid& grid, Block& block);
  bool take_turns(Grid& grid, Warp& warp);
  void resume(Grid& grid, Thread& thread);
  bool some_can_go_on(const Block& block) const;
  void clear();

  ThreadPool pool_;
  std::vector<std::unique_ptr<Block>> active_, idle_;
  std::vector<uint32_t> warp_order_;
};

}  // namespace emulation
