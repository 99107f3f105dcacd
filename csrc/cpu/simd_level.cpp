#include "cpu/simd_level.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

namespace quaver::cpu {
namespace {

const char* const kNames[] = {"base", "v3", "v4"};

Level from_environment() {
  Level cap = kV4;
  // A name it does not know is reported by `quaver info`, which asks for the variable itself.
  if (const char* name = std::getenv("QUAVER_SIMD")) level_from_name(name, cap);
  return std::min(cap, detected_level());
}

std::atomic<Level>& current() {
  static std::atomic<Level> level{from_environment()};
  return level;
}

}  // namespace

const char* level_name(Level level) { return kNames[level]; }

bool level_from_name(const char* name, Level& level) {
  for (int i = kBase; i <= kV4; i++) {
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
  if (__builtin_cpu_supports("x86-64-v4")) return kV4;
  if (__builtin_cpu_supports("x86-64-v3")) return kV3;
#endif
  return kBase;
}

Level current_level() { return current().load(std::memory_order_relaxed); }

bool has_bf16() {
#if defined(__x86_64__) && !defined(QUAVER_PORTABLE)
  static const bool supported = __builtin_cpu_supports("avx512bf16");
  return supported && current_level() == kV4;
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
