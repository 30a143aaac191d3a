#include "emulation/history.h"

#include <algorithm>

namespace emulation {
namespace races {

void Knowledge::add_block(uint32_t block, Time before) {
  Time& time = blocks[block];
  time = std::max(time, before);
}

void Knowledge::add_thread(Who who, Time until) {
  Time& time = threads[who];
  time = std::max(time, until);
}

void Knowledge::add(const Knowledge& other) {
  for (const auto& [block, before] : other.blocks) add_block(block, before);
  for (const auto& [who, until] : other.threads) add_thread(who, until);
}

bool Knowledge::holds(const Access& access) const {
  const auto block = blocks.find(block_of(access.who));
  if (block != blocks.end() && access.time < block->second) return true;
  const auto thread = threads.find(access.who & ~kAtomic);
  return thread != threads.end() && access.time <= thread->second;
}

Cell* GlobalCells::find(uintptr_t address) {
  const uintptr_t number = address / kPage;
  if (number != last_number_ || !last_) {
    auto& page = pages_[number];
    if (!page) page = std::make_unique<Page>();
    last_number_ = number;
    last_ = page.get();
  }
  return &last_->cells[address % kPage];
}

// Between launches nothing of it is needed; it is kept because making it anew takes time.
void GlobalCells::limit_size() {
  if (pages_.size() <= 1024) return;
  pages_.clear();
  last_ = nullptr;
}

}  // namespace races
}  // namespace emulation
