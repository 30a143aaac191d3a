#include "emulation/settings.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulation {

namespace {

// Each thread that a processor holds has a stack, and a process may only have so many.
constexpr int kMostProcessors = 8;

}  // namespace

std::string Order::text() const {
  if (kind == forward) return "forward";
  if (kind == reverse) return "reverse";
  return "random:" + std::to_string(seed);
}

Device device_from_environment(std::string* problem) {
  Device device;
  const char* text = std::getenv("SPECPREFILL_EMULATION_DEVICE");
  if (!text || !*text) return device;
  int end = -1;
  const int found =
      std::sscanf(text, "%d:%d:%d%n", &device.processors, &device.shared_kib, &device.compute_capability, &end);
  if (found != 3 || end != static_cast<int>(std::strlen(text)) || device.processors < 1 ||
      device.processors > kMostProcessors || device.shared_kib < 48 || device.shared_kib > 1024 ||
      device.compute_capability < 50) {
    *problem = std::string(
                   "SPECPREFILL_EMULATION_DEVICE: expected processors:shared_kib:compute_capability with at most 8 "
                   "processors, as in "
                   "4:227:90, got '") +
               text + "'";
    return Device();
  }
  return device;
}

Order order_from_environment(std::string* problem) {
  Order order;
  const char* text = std::getenv("SPECPREFILL_EMULATION_ORDER");
  if (!text || !*text || !std::strcmp(text, "random")) return order;
  if (!std::strcmp(text, "forward")) {
    order.kind = Order::forward;
  } else if (!std::strcmp(text, "reverse")) {
    order.kind = Order::reverse;
  } else {
    unsigned long long seed = 0;
    int end = -1;
    if (std::sscanf(text, "random:%llu%n", &seed, &end) != 1 || end != static_cast<int>(std::strlen(text))) {
      *problem = std::string("SPECPREFILL_EMULATION_ORDER: expected forward, reverse, random or random:SEED, got '") +
                 text + "'";
    }
    order.seed = seed;
  }
  return order;
}

int blocks_on_processor(const Device& device, uint64_t threads, size_t shared_bytes) {
  if (threads < 1 || threads > 1024 || shared_bytes > device.shared_bytes()) return 0;
  const uint64_t warps = (threads + 31) / 32;
  const uint64_t by_threads = Device::kThreads / 32 / warps;
  const uint64_t by_memory = device.shared_bytes_of_processor() / (shared_bytes + Device::kReservedShared);
  return static_cast<int>(std::min<uint64_t>({by_threads, by_memory, Device::kBlocks}));
}

}  // namespace emulation
