// What g++ -fsanitize=thread calls for every access of the code that it instruments. libtsan is not linked: these
// functions take its place, inside this library only. Host code is instrumented as well; check() ignores it.
#include <cstddef>
#include <cstdint>

#include "memory.h"

using quaver::emulator::check;
using quaver::emulator::Touch;

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define QUAVER_HOOK(name, touch, bytes, aligned) \
  void name(void* address) { check(Touch::touch, address, bytes, aligned, __builtin_return_address(0)); }
#define QUAVER_HOOKS(bytes)                                      \
  QUAVER_HOOK(__tsan_read##bytes, kRead, bytes, true)            \
  QUAVER_HOOK(__tsan_write##bytes, kWrite, bytes, true)          \
  QUAVER_HOOK(__tsan_unaligned_read##bytes, kRead, bytes, false) \
  QUAVER_HOOK(__tsan_unaligned_write##bytes, kWrite, bytes, false)
QUAVER_HOOKS(1)
QUAVER_HOOKS(2)
QUAVER_HOOKS(4)
QUAVER_HOOKS(8)
QUAVER_HOOKS(16)
void __tsan_read_range(void* address, size_t bytes) {
  check(Touch::kRead, address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
  check(Touch::kWrite, address, bytes, false, __builtin_return_address(0));
}

// std::atomic and shared_ptr in host code; kernels have CUDA's functions (atomics.cpp).
#define QUAVER_ATOMIC_UPDATE(bits, operation)                                                                     \
  uint##bits##_t __tsan_atomic##bits##_##operation(volatile uint##bits##_t* address, uint##bits##_t value, int) { \
    return __atomic_##operation(address, value, __ATOMIC_SEQ_CST);                                                \
  }
#define QUAVER_ATOMIC_COMPARE(bits, strength, weak)                                                                 \
  int __tsan_atomic##bits##_compare_exchange_##strength(volatile uint##bits##_t* address, uint##bits##_t* expected, \
                                                        uint##bits##_t value, int, int) {                           \
    return __atomic_compare_exchange_n(address, expected, value, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }
#define QUAVER_ATOMIC_HOOKS(bits)                                                                              \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* address, int) {                     \
    return __atomic_load_n(address, __ATOMIC_SEQ_CST);                                                         \
  }                                                                                                            \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* address, uint##bits##_t value, int) {              \
    __atomic_store_n(address, value, __ATOMIC_SEQ_CST);                                                        \
  }                                                                                                            \
  uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* address, uint##bits##_t value, int) { \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                                              \
  }                                                                                                            \
  QUAVER_ATOMIC_UPDATE(bits, fetch_add)                                                                        \
  QUAVER_ATOMIC_UPDATE(bits, fetch_sub)                                                                        \
  QUAVER_ATOMIC_UPDATE(bits, fetch_and)                                                                        \
  QUAVER_ATOMIC_UPDATE(bits, fetch_or)                                                                         \
  QUAVER_ATOMIC_UPDATE(bits, fetch_xor)                                                                        \
  QUAVER_ATOMIC_COMPARE(bits, strong, false)                                                                   \
  QUAVER_ATOMIC_COMPARE(bits, weak, true)
QUAVER_ATOMIC_HOOKS(8)
QUAVER_ATOMIC_HOOKS(16)
QUAVER_ATOMIC_HOOKS(32)
QUAVER_ATOMIC_HOOKS(64)

}  // extern "C"
