// Stacks and the switch between them: one for each thread of the block.
#pragma once
#include <cstddef>
#include <cstdint>

// QUAVER_EMULATOR_UCONTEXT: take the portable way on x86-64 too, to test it.
#if !defined(__x86_64__) && !defined(QUAVER_EMULATOR_UCONTEXT)
#define QUAVER_EMULATOR_UCONTEXT
#endif
#ifdef QUAVER_EMULATOR_UCONTEXT
#include <ucontext.h>
#endif

namespace quaver::emulator {

struct Context {
#ifdef QUAVER_EMULATOR_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer;  // everything else lies on the stack
#endif
};

constexpr size_t kStackBytes = 128 << 10;  // of address space; pages that are never touched cost nothing
constexpr size_t kGuardBytes = 4 << 10;    // below each stack: an overflow stops there

// The stack of thread `index`, as its lowest address. All are mapped on the first call and kept.
char* stack_of(int index);

// The next switch to `context` calls entry(), which must not return, on the given stack.
void prepare(Context& context, char* stack, void (*entry)());
void switch_to(Context& from, Context& to);

}  // namespace quaver::emulator
