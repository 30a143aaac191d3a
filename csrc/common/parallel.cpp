#include "common/parallel.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#include "common/guarded.h"

namespace specprefill {
namespace {

struct Job {
  int64_t num_tasks;
  void (*run)(void*, int64_t, int);
  void* context;
};

// Workers sleep between jobs; a score call has two jobs per wave in quick succession, so they look for the next one for
// this long first, about what a wake-up costs.
constexpr std::chrono::microseconds kSpin{50};

template <class Ready>
void spin_until(const Ready& ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  while (!ready() && std::chrono::steady_clock::now() < end) std::this_thread::yield();
}

class Pool {
 public:
  void run(const Job& job, int num_threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock() || num_threads <= 1 || job.num_tasks <= 1) {
      for (int64_t task = 0; task < job.num_tasks; ++task) job.run(job.context, task, 0);
      return;
    }
    const int helpers =
        grow(static_cast<int>(num_threads - 1 < job.num_tasks - 1 ? num_threads - 1 : job.num_tasks - 1));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = job;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = helpers;
      running_.store(helpers, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    work(job, 0);
    spin_until([this] { return running_.load(std::memory_order_acquire) == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_.load(std::memory_order_acquire) == 0; });
  }

 private:
  void work(const Job& job, int worker) {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < job.num_tasks;) {
      job.run(job.context, task, worker);
    }
  }

  // Makes sure that `helpers` workers exist; returns how many do, fewer where the system refuses threads.
  int grow(int helpers) {
    while (size_ < helpers) {
      try {
        std::thread(&Pool::live, this, size_ + 1, generation_.load(std::memory_order_relaxed)).detach();
      } catch (const std::system_error&) {
        return size_;
      }
      ++size_;
    }
    return helpers;
  }

  void live(int worker, uint64_t seen) {
    const DefaultFloatingPoint floating_point;  // not what the thread that started this one had set
    (void)floating_point;
    for (;;) {
      spin_until([&] { return generation_.load(std::memory_order_acquire) != seen; });
      Job job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (worker > wanted_) continue;
        job = job_;
      }
      work(job, worker);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);  // so that the notice cannot fall between a check and its wait
        done_.notify_one();
      }
    }
  }

  std::mutex owner_;  // held by the caller whose job runs
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job job_{};
  int wanted_ = 0, size_ = 0;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> running_{0};
};

// Never destroyed: workers may still look at it while the process exits. A forked child has none of the workers, so it
// starts over with a pool of its own.
std::atomic<Pool*> current{nullptr};

Pool& pool() {
  static const bool ready = [] {
    current.store(new Pool);
    pthread_atfork(nullptr, nullptr, [] { current.store(new Pool); });
    return true;
  }();
  (void)ready;
  return *current.load(std::memory_order_acquire);
}

}  // namespace

void parallel_for(int64_t num_tasks, int num_threads, void (*run)(void*, int64_t, int), void* context) {
  pool().run({num_tasks, run, context}, num_threads);
}

}  // namespace specprefill
