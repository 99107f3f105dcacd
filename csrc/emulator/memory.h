// What may be read and written: regions of memory, and for each of their bytes who touched it last.
#pragma once
#include <cstddef>
#include <cstdint>

#include "launch.h"
#include "report.h"

namespace quaver::emulator {

// The regions of one launch: its parameters, its shared memory.
void start_launch(size_t shared_bytes, const void* call, size_t call_bytes);
// Shared memory is undefined again: every byte becomes 0xff, a NaN in all floating types.
void start_shared_memory();
// Forgets all regions.
void clear_regions();

enum class Touch { kRead, kWrite, kAtomic };
// Called before every access of instrumented code. An access that cannot be carried out (out of bounds, misaligned, a
// write to an input) ends the launch.
void check(Touch touch, const void* address, size_t bytes, bool aligned, Site site);
// A lane's row of a matrix in shared memory is read.
void check_shared_row(const void* row, size_t bytes, Site site);
// An asynchronous copy to `copied` bytes of shared memory starts, of which `bytes` are read: what it writes belongs to
// nobody until complete_copy.
void check_copy(const void* to, const void* from, size_t copied, int bytes, Site site);
void complete_copy(const void* to, size_t copied);

}  // namespace quaver::emulator
