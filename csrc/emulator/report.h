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
};

// Each place reports each kind of fault once. `pc`: a return address in kernel code.
void report(Fault fault, Location location, const std::string& details);
void report(Fault fault, const void* pc, const std::string& details);
// One line a fault: "file:line: kind: details".
std::string all_reports();
void clear_reports();

std::string to_string(Location location);
__attribute__((format(printf, 1, 2))) std::string format(const char* pattern, ...);

}  // namespace quaver::emulator
