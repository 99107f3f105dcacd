// Asynchronous copies: each thread's groups of them, and when they happen.
#pragma once
#include "location.h"

namespace quaver::emulator {

// A copy may happen at any time between its start and the wait for it: as early or as late as it can, or either by
// chance. A kernel that is right cannot tell.
enum class Moment { kEarly, kLate, kRandom };
void set_moment(Moment moment, unsigned seed);

// Forgets the copies of the block before.
void start_copies();

// `size` bytes from global to shared memory: the first `bytes`, then zeros.
void start_copy(void* to, const void* from, int size, int bytes, Location location);
void commit_copies();
// Waits for all groups of the running thread but the latest `left`.
void await_copies(int left);

}  // namespace quaver::emulator
