// Which of the compiled instruction sets runs: the best of this machine, or the cap that QUAVER_SIMD sets.
#pragma once

namespace quaver::cpu {

// kAmx: v4 on a processor whose tiles multiply bf16 (AMX-BF16); only products of bf16 have loops of their own there.
enum Level { kBase = 0, kV3 = 1, kV4 = 2, kAmx = 3 };

const char* level_name(Level level);
// Returns false, and changes nothing, when `name` is not one of base, v3, v4, amx.
bool level_from_name(const char* name, Level& level);

Level detected_level();
// The level in use: detected_level(), lowered to QUAVER_SIMD or to the last cap_level().
Level current_level();
void cap_level(Level level);
// Whether v4 is in use on a processor that also multiplies pairs of bf16 (AVX512-BF16, which no level includes).
bool has_bf16();
inline bool has_amx() { return current_level() == kAmx; }

#if defined(__x86_64__) && !defined(QUAVER_PORTABLE)
#define QUAVER_LOOPS(Table, name)                                             \
  extern const Table name##_base, name##_v3, name##_v4;                       \
  inline __attribute__((always_inline)) const Table& name() {                 \
    const Level level = current_level();                                      \
    return level >= kV4 ? name##_v4 : level == kV3 ? name##_v3 : name##_base; \
  }
#else
#define QUAVER_LOOPS(Table, name) \
  extern const Table name##_base; \
  inline __attribute__((always_inline)) const Table& name() { return name##_base; }
#endif

}  // namespace quaver::cpu
