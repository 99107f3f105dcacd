// The faults found since the last reset.
#pragma once
#include <string>

#include "location.h"

namespace quaver::emulator {

enum class Fault {
  kSharedRace,
  kGlobalRace,
  kBlockRace,
  kOutOfBounds,
  kMisaligned,
  kUninitialised,
  kReadOnly,
  kForeignStack,
  kDivergentBarrier,
  kEarlyExit,
  kDeadlock,
  kWrongMask,
  kInactiveLane,
  kNotAwaited,
};

// Where a fault is: a return address in kernel code, or a line of it.
struct Site {
  const void* pc = nullptr;
  Location location = {"", 0};

  Site(const void* pc) : pc(pc) {}
  Site(Location location) : location(location) {}
};

// Each place reports each kind of fault once.
void report(Fault fault, Site site, const std::string& details);
// One line a fault: "file:line: kind: details".
std::string all_reports();
void clear_reports();

std::string to_string(Location location);
__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...);

}  // namespace quaver::emulator
