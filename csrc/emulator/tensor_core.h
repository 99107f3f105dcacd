// The instructions of csrc/cuda/gpu.h that have no name in CUDA C++, for kernels compiled by g++. Fragments lie in the
// registers of a warp's lanes as the PTX ISA says: gpu.h has the layouts.
#pragma once
#include <type_traits>

#include "common/dtype.h"
#include "copies.h"
#include "memory.h"
#include "warp.h"

namespace quaver::emulator {

struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};
template <class T>
void finish_multiply_add(const Lane* lanes, uint32_t mask, Location location);
void finish_load_matrices(const Lane* lanes, uint32_t mask, Location location);
void finish_load_transposed(const Lane* lanes, uint32_t mask, Location location);

}  // namespace quaver::emulator

namespace quaver::gpu {

// The last parameter of every function here: the line that calls it.
#define QUAVER_CALLER emulator::Location location = emulator::Location::here()

inline void copy_async(void* to, const void* from, int bytes, QUAVER_CALLER) {
  emulator::start_copy(to, from, 16, bytes, location);
}
inline void copy_async_8(void* to, const void* from, int bytes, QUAVER_CALLER) {
  emulator::start_copy(to, from, 8, bytes, location);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int N>
void await_copies() {
  emulator::await_copies(N);
}

inline void load_matrices(uint32_t (&out)[4], const void* row, QUAVER_CALLER) {
  emulator::check_shared_row(row, 16, location);
  emulator::warp_collective(emulator::finish_load_matrices, emulator::kFullMask, {row, out, 16, 0}, location);
}
inline void load_transposed(uint32_t (&out)[4], const void* row, QUAVER_CALLER) {
  emulator::check_shared_row(row, 16, location);
  emulator::warp_collective(emulator::finish_load_transposed, emulator::kFullMask, {row, out, 16, 0}, location);
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, QUAVER_CALLER) {
  const emulator::Fragments in = {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
  emulator::warp_collective(emulator::finish_multiply_add<T>, emulator::kFullMask, {&in, c, sizeof c, 0}, location);
}
#undef QUAVER_CALLER

}  // namespace quaver::gpu
