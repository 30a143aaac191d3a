// Running independent tasks on several threads of one process-wide pool.
#pragma once

#include <cstdint>

namespace specprefill {

// Calls run(context, task, worker) for each task in [0, num_tasks), worker in [0, num_threads). Tasks are handed out
// one by one, so a result must not depend on which worker ran a task. Returns when all are done. A second caller, while
// the pool is busy, runs its tasks on its own thread. `run` must not throw.
void parallel_for(int64_t num_tasks, int num_threads, void (*run)(void* context, int64_t task, int worker),
                  void* context);

// How many of the threads are worth waking to move so many bytes: one wake-up takes as long as moving some 128 KiB.
inline int threads_for(int64_t bytes, int num_threads) {
  const int64_t most = 1 + bytes / (int64_t{256} << 10);
  return most < num_threads ? static_cast<int>(most) : num_threads;
}

template <class F>
void parallel_for(int64_t num_tasks, int num_threads, const F& body) {
  parallel_for(
      num_tasks, num_threads,
      [](void* context, int64_t task, int worker) { (*static_cast<const F*>(context))(task, worker); },
      const_cast<F*>(&body));
}

}  // namespace specprefill
