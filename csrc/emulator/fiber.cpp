#include "fiber.h"

#include <sys/mman.h>

#include <new>

#include "block.h"

#ifndef QUAVER_EMULATOR_UCONTEXT
// System V x86-64: a call preserves rbp, rbx and r12 to r15; the rest is the caller's to save. ucontext would save the
// signal mask as well, with a system call (1.3 us a switch against 6 ns).
extern "C" __attribute__((visibility("hidden"))) void quaver_emulator_switch(void** from, void* to);
asm(R"(
    .text
    .globl quaver_emulator_switch
    .hidden quaver_emulator_switch
    .type quaver_emulator_switch, @function
quaver_emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size quaver_emulator_switch, . - quaver_emulator_switch
)");
#endif

namespace quaver::emulator {

char* stack_of(int index) {
  static char* const stacks = [] {
    void* const memory = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    for (int i = 0; i < kMaxThreads; i++) {
      mprotect(static_cast<char*>(memory) + size_t(i) * kStackBytes, kGuardBytes, PROT_NONE);
    }
    return static_cast<char*>(memory);
  }();
  return stacks + size_t(index) * kStackBytes;
}

#ifdef QUAVER_EMULATOR_UCONTEXT
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack + kGuardBytes;
  context.registers.uc_stack.ss_size = kStackBytes - kGuardBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

void switch_to(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
#else
void prepare(Context& context, char* stack, void (*entry)()) {
  // What quaver_emulator_switch pops: six registers and its return address, then the word that entry() takes for its
  // own return address. The latter puts the stack pointer at 8 modulo 16, as a function expects it.
  constexpr int kRegisters = 6;
  void** const top = reinterpret_cast<void**>(stack + kStackBytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kRegisters; i++) top[-3 - i] = nullptr;
  context.stack_pointer = top - 2 - kRegisters;
}

void switch_to(Context& from, Context& to) { quaver_emulator_switch(&from.stack_pointer, to.stack_pointer); }
#endif

}  // namespace quaver::emulator
