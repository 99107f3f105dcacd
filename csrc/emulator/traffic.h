// What kernels move, if asked to count: the bytes of each region of memory, and for each line of source what its
// accesses cost a GPU: the sectors of global memory that a warp touches, the passes that it takes through the banks of
// shared memory.
//
// A warp's lanes take turns here, so that an instruction of the warp is made up again from its lanes: the n-th access
// of a place since all lanes last met is one instruction. Where lanes go round a loop a different number of times
// between two meetings that is a guess.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "memory.h"

namespace quaver::emulator {

// Forgets all counts and counts from now on.
void start_counting();
// Keeps them.
void stop_counting();

// `region`: where the access's region of global memory begins, 0 in shared memory.
void count_access(Touch touch, uintptr_t region, uintptr_t address, size_t bytes, Site site);
// All lanes of a warp are at the same place.
void count_meeting(int warp);

struct Moved {
  uint64_t read, written;  // bytes that lanes asked for; an atomic access does both
};
// Of the regions that begin in these bytes.
Moved moved_by(const void* begin, size_t bytes);
// A line for each line of source, space and kind of access, separated by tabs: place, "global" or "shared", "read",
// "write" or "atomic", then instructions of warps, bytes asked for, sectors (of 32 bytes) and the least that so many
// bytes can be in; of shared memory, passes (of 32 banks, 4 bytes wide) and the least.
std::string all_traffic();

}  // namespace quaver::emulator
