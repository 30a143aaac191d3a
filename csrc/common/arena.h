// Scratch memory: cut from one block, 64-byte aligned, or only counted.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specprefill {

class Arena {
 public:
  static constexpr size_t kAlign = 64;

  // Without memory it only adds up what is asked for.
  Arena() = default;
  Arena(void* memory, size_t bytes) {
    const size_t skip = (kAlign - reinterpret_cast<uintptr_t>(memory) % kAlign) % kAlign;
    base_ = static_cast<char*>(memory) + skip;
    capacity_ = bytes > skip ? bytes - skip : 0;
  }

  template <class T>
  T* take(int64_t count) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(count) * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return p;
  }

  size_t used() const { return used_; }
  size_t capacity() const { return capacity_; }
  void rewind(size_t used) { used_ = used; }

 private:
  char* base_ = nullptr;
  size_t used_ = 0, capacity_ = 0;
};

}  // namespace specprefill
