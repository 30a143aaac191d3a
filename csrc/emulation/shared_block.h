// The shared memory of one block, between guards.
#pragma once

#include <cstddef>
#include <memory>

namespace emulation {

class SharedBlock {
 public:
  ~SharedBlock();

  // Makes `bytes` of memory that are all 0xff.
  void start(size_t bytes);
  // Whether the guards are as they were; else *written is where one was changed, counted from the memory's start.
  bool finish(ptrdiff_t* written);

  unsigned char* data() const { return data_; }
  size_t size() const { return size_; }
  bool contains(const void* address, size_t bytes = 1) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return p >= data_ && p + bytes <= data_ + size_;
  }
  // Behind or before the memory, but nobody else's.
  bool near(const void* address) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return p >= data_ - kGuard && p < data_ + size_ + kGuard;
  }

 private:
  static constexpr size_t kGuard = 1024;

  void protect(bool on);

  std::unique_ptr<unsigned char[]> memory_;
  size_t capacity_ = 0;
  unsigned char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace emulation
