// One thread of the host runs all threads of a block: an atomic function need not be atomic, only checked as one.
#include "atomics.h"

#include <utility>

#include "memory.h"

namespace {

// always_inline: the return address is then the one of the atomic function that calls it.
template <class T, class F>
inline __attribute__((always_inline)) T update(T* address, F&& f) {
  quaver::emulator::check(quaver::emulator::Touch::kAtomic, address, sizeof(T), true, __builtin_return_address(0));
  const T old = *address;
  *address = f(old);
  return old;
}

}  // namespace

#define QUAVER_ATOMIC(name, type, expression)                                              \
  type name(type* address, type value) {                                                   \
    return update(address, [=]([[maybe_unused]] type old) -> type { return expression; }); \
  }
#define QUAVER_ATOMICS(name, expression)    \
  QUAVER_ATOMIC(name, int, expression)      \
  QUAVER_ATOMIC(name, unsigned, expression) \
  QUAVER_ATOMIC(name, unsigned long long, expression)

QUAVER_ATOMIC(atomicAdd, int, int(unsigned(old) + unsigned(value)))
QUAVER_ATOMIC(atomicAdd, unsigned, old + value)
QUAVER_ATOMIC(atomicAdd, unsigned long long, old + value)
QUAVER_ATOMIC(atomicAdd, float, old + value)
QUAVER_ATOMIC(atomicAdd, double, old + value)
QUAVER_ATOMICS(atomicMin, value < old ? value : old)
QUAVER_ATOMICS(atomicMax, old < value ? value : old)
QUAVER_ATOMICS(atomicAnd, old& value)
QUAVER_ATOMICS(atomicOr, old | value)
QUAVER_ATOMICS(atomicXor, old ^ value)
QUAVER_ATOMICS(atomicExch, value)
QUAVER_ATOMIC(atomicExch, float, value)

#define QUAVER_COMPARE_AND_SWAP(type)                                                \
  type atomicCAS(type* address, type expected, type value) {                         \
    return update(address, [=](type old) { return old == expected ? value : old; }); \
  }
QUAVER_COMPARE_AND_SWAP(int)
QUAVER_COMPARE_AND_SWAP(unsigned)
QUAVER_COMPARE_AND_SWAP(unsigned long long)
