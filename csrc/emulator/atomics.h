// CUDA's atomic functions. They are defined in atomics.cpp, outside the instrumented code: an atomic access is its own
// kind to the memory checks, neither a read nor a write.
#pragma once

#define QUAVER_ATOMIC(name, type) type name(type* address, type value);
#define QUAVER_ATOMICS(name)    \
  QUAVER_ATOMIC(name, int)      \
  QUAVER_ATOMIC(name, unsigned) \
  QUAVER_ATOMIC(name, unsigned long long)
QUAVER_ATOMICS(atomicAdd)
QUAVER_ATOMIC(atomicAdd, float)
QUAVER_ATOMIC(atomicAdd, double)
QUAVER_ATOMICS(atomicMin)
QUAVER_ATOMICS(atomicMax)
QUAVER_ATOMICS(atomicAnd)
QUAVER_ATOMICS(atomicOr)
QUAVER_ATOMICS(atomicXor)
QUAVER_ATOMICS(atomicExch)
QUAVER_ATOMIC(atomicExch, float)
#undef QUAVER_ATOMIC
#undef QUAVER_ATOMICS

int atomicCAS(int* address, int expected, int value);
unsigned atomicCAS(unsigned* address, unsigned expected, unsigned value);
unsigned long long atomicCAS(unsigned long long* address, unsigned long long expected, unsigned long long value);
