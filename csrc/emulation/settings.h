// What the environment says: the emulated device and the order that threads run in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulation {

// SPECPREFILL_EMULATION_DEVICE=processors:shared_kib:compute_capability, as in 4:227:90.
struct Device {
  int processors = 4;
  int shared_kib = 227;  // that one block may have
  int compute_capability = 90;

  size_t shared_bytes() const { return static_cast<size_t>(shared_kib) << 10; }
  // A processor has 1 KiB more, which each block on it pays for itself.
  size_t shared_bytes_of_processor() const { return shared_bytes() + kReservedShared; }

  static constexpr size_t kReservedShared = 1024;
  static constexpr int kThreads = 2048, kBlocks = 32;  // that a processor holds
};

// SPECPREFILL_EMULATION_ORDER=forward, reverse, random or random:SEED.
struct Order {
  enum Kind { forward, reverse, random } kind = random;
  uint64_t seed = 0;

  std::string text() const;
};

// Read from the environment each time, so that a test may set it. `problem` says what is wrong with a value.
Device device_from_environment(std::string* problem);
Order order_from_environment(std::string* problem);

// How many blocks one processor holds at a time; 0 if not even one.
int blocks_on_processor(const Device& device, uint64_t threads, size_t shared_bytes);

}  // namespace emulation
