// Global memory: what kernels may touch besides shared memory and their own. Host code registers it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quaver::emulator {

enum class Use {
  kInput,    // has contents, must not be written
  kOutput,   // has no contents until a kernel writes them: every byte becomes 0xff
  kUpdated,  // has contents, may be written
};

// Replaces all regions that it overlaps: their memory has been given back and allocated again.
void register_region(void* begin, size_t bytes, const char* name, Use use);

// A region for each contiguous run of a strided tensor, so that the gaps between rows are out of bounds.
void register_tensor(const void* data, size_t element_bytes, const int64_t* sizes, const int64_t* strides, int64_t dims,
                     Use use);

}  // namespace quaver::emulator
