#include "emulation/atomics.h"

#include <type_traits>

#include "emulation/grid.h"
#include "emulation/memory.h"
#include "emulation/races.h"

namespace emulation {

namespace {

// Before an operation on memory that other threads use at the same time, by the code at `where`.
template <class T>
void begin(const T* address, races::Atomic kind, const void* where) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) {
    fail("uses %p atomically, which is no multiple of %zu", static_cast<const void*>(address), sizeof(T));
  }
  Thread& thread = *self;
  // In random order threads of other blocks may come in between.
  Grid& grid = *thread.block->grid;
  if (grid.order.kind == Order::random && grid.random.below(16) == 0) give_way(true);
  races::atomic(address, sizeof(T), kind, where);
}

// A loop of operations that change nothing waits for another thread, which must have its turn.
void end(bool changed) {
  Thread& thread = *self;
  if (changed) {
    thread.polls = 0;
    thread.block->grid->moved = true;
  } else if (++thread.polls >= 16) {
    give_way(true);
  }
}

template <class T>
T result(Update kind, T old, T operand) {
  if constexpr (std::is_integral<T>::value) {
    using U = typename std::make_unsigned<T>::type;  // wraps around where signed arithmetic may not
    switch (kind) {
      case Update::add: return static_cast<T>(static_cast<U>(old) + static_cast<U>(operand));
      case Update::sub: return static_cast<T>(static_cast<U>(old) - static_cast<U>(operand));
      case Update::min: return old < operand ? old : operand;
      case Update::max: return old < operand ? operand : old;
      case Update::bit_and: return old & operand;
      case Update::bit_or: return old | operand;
      case Update::bit_xor: return old ^ operand;
      case Update::exchange: return operand;
      case Update::increment: return old >= operand ? T(0) : static_cast<T>(old + 1);
      case Update::decrement: return old == 0 || old > operand ? operand : static_cast<T>(old - 1);
    }
  }
  return kind == Update::add ? old + operand : operand;
}

}  // namespace

template <class T>
T update(Update kind, T* address, T operand) {
  running("an atomic function");
  begin(address, races::Atomic::update, __builtin_return_address(0));
  const T old = *address;
  const T desired = result(kind, old, operand);
  *address = desired;
  end(std::memcmp(&old, &desired, sizeof old) != 0);
  return old;
}

template <class T>
T compare_and_swap(T* address, T expected, T desired) {
  running("atomicCAS");
  begin(address, races::Atomic::update, __builtin_return_address(0));
  const T old = *address;
  if (old == expected) *address = desired;
  end(old == expected && old != desired);
  return old;
}

template int update(Update, int*, int);
template unsigned update(Update, unsigned*, unsigned);
template long long update(Update, long long*, long long);
template unsigned long long update(Update, unsigned long long*, unsigned long long);
template float update(Update, float*, float);
template double update(Update, double*, double);
template int compare_and_swap(int*, int, int);
template unsigned compare_and_swap(unsigned*, unsigned, unsigned);
template unsigned long long compare_and_swap(unsigned long long*, unsigned long long, unsigned long long);

template <class T>
T load_relaxed(const T* address) {
  running("load_relaxed");
  begin(address, races::Atomic::relaxed_load, __builtin_return_address(0));
  const T value = *address;
  end(false);
  return value;
}
template float load_relaxed(const float*);
template unsigned load_relaxed(const unsigned*);

unsigned load_acquire(const unsigned* address) {
  running("load_acquire");
  begin(address, races::Atomic::load_acquire, __builtin_return_address(0));
  const unsigned value = *address;
  end(false);
  return value;
}

void store_release(unsigned* address, unsigned value) {
  running("store_release");
  begin(address, races::Atomic::store_release, __builtin_return_address(0));
  const bool changed = *address != value;
  *address = value;
  end(changed);
}

}  // namespace emulation
