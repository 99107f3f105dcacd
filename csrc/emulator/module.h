// The shared library that kernels and emulator are linked into.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace quaver::emulator {

struct Module {
  std::string path;
  uintptr_t base = 0, end = 0;

  bool contains(uintptr_t address) const { return address - base < end - base; }
};
const Module& this_module();

// The thread-local variables of the library, of the calling thread: the kernels' shared variables.
struct ThreadLocal {
  char* begin;
  size_t bytes;
};
ThreadLocal thread_local_storage();

// "file:line" of each call that returns to one of `pcs`, followed by the lines that it was inlined into; lines of the
// emulator itself are left out. Without addr2line: the module and the offset in it.
std::vector<std::string> source_lines(const std::vector<const void*>& pcs);
// Relative to the project's root.
std::string short_path(const std::string& path);

}  // namespace quaver::emulator
