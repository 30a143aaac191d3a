// Scratch memory: cut from one block, 64-byte aligned, or only counted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

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

  // rows * columns elements. Throws where no memory could hold them.
  template <class T>
  T* take(int64_t rows, int64_t columns = 1) {
    T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    size_t bytes;
    if (__builtin_mul_overflow(static_cast<size_t>(rows), static_cast<size_t>(columns), &bytes) ||
        __builtin_mul_overflow(bytes, sizeof(T), &bytes) || __builtin_add_overflow(bytes, kAlign - 1, &bytes) ||
        __builtin_add_overflow(used_, bytes / kAlign * kAlign, &used_) || used_ > PTRDIFF_MAX) {
      throw std::bad_alloc();
    }
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
