// A line of kernel source.
#pragma once
#include <cstring>

namespace quaver::emulator {

struct Location {
  const char* file;
  int line;
  // As a default argument this is the line of the call.
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// By content: every translation unit has its own copy of a header's name.
inline bool operator==(const Location& a, const Location& b) {
  return a.line == b.line && (a.file == b.file || !std::strcmp(a.file, b.file));
}

}  // namespace quaver::emulator
