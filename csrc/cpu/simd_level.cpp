#include "cpu/simd_level.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace quaver::cpu {
namespace {

const char* const kNames[] = {"base", "v3", "v4", "amx"};

Level from_environment() {
  Level cap = kAmx;
  // A name it does not know is reported by `quaver info`, which asks for the variable itself.
  if (const char* name = std::getenv("QUAVER_SIMD")) level_from_name(name, cap);
  return std::min(cap, detected_level());
}

std::atomic<Level>& current() {
  static std::atomic<Level> level{from_environment()};
  return level;
}

#if defined(__x86_64__) && !defined(QUAVER_PORTABLE)
// Whether the processor multiplies tiles of bf16 and the system lets this process use them: Linux is asked once, for
// all threads, since their state (8 KiB) is saved only for those who asked.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  uint32_t a = 7, b = 0, c = 0, d = 0;
  asm("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  constexpr uint32_t kBf16 = 1u << 22, kTiles = 1u << 24;
  if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}
#endif

}  // namespace

const char* level_name(Level level) { return kNames[level]; }

bool level_from_name(const char* name, Level& level) {
  for (int i = kBase; i <= kAmx; i++) {
    if (std::strcmp(name, kNames[i]) == 0) {
      level = Level(i);
      return true;
    }
  }
  return false;
}

Level detected_level() {
#if defined(__x86_64__) && !defined(QUAVER_PORTABLE)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return may_use_tiles() ? kAmx : kV4;
  if (__builtin_cpu_supports("x86-64-v3")) return kV3;
#endif
  return kBase;
}

Level current_level() { return current().load(std::memory_order_relaxed); }

bool has_bf16() {
#if defined(__x86_64__) && !defined(QUAVER_PORTABLE)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && current_level() >= kV4;
#else
  return false;
#endif
}

void cap_level(Level level) { current().store(std::min(level, detected_level()), std::memory_order_relaxed); }

}  // namespace quaver::cpu

// For Python (kernels/_library.py), through ctypes: the level of the library that holds the ops.
extern "C" {
__attribute__((visibility("default"))) const char* quaver_current_simd() {
  return quaver::cpu::level_name(quaver::cpu::current_level());
}
__attribute__((visibility("default"))) bool quaver_has_bf16() { return quaver::cpu::has_bf16(); }
__attribute__((visibility("default"))) bool quaver_cap_simd(const char* name) {
  quaver::cpu::Level level;
  if (!quaver::cpu::level_from_name(name, level)) return false;
  quaver::cpu::cap_level(level);
  return true;
}
}
