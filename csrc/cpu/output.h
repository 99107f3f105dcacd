// Where the CPU ops write: large outputs ask for huge pages.
#pragma once
#include "common/tensor.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace quaver::cpu {

// The bytes of a tensor that is about to be written whole. A large one is usually fresh memory, whose first touch
// faults page by page: 64 MiB take 25 ms in pages of 4 KiB and 4 ms in pages of 2 MiB, where noise for them takes 6 ms.
template <class T>
T* output(const Tensor& tensor) {
  T* bytes = data<T>(tensor);
#if defined(__linux__)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(bytes) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(bytes) + uintptr_t(tensor.numel() * tensor.element_size())) / kHugePage * kHugePage;
  // A hint: where it is refused, nothing is lost.
  if (end >= begin + 4 * kHugePage) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return bytes;
}

}  // namespace quaver::cpu
