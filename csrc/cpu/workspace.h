// Memory that a thread keeps from call to call, for what is packed or made on the way: fresh memory would be faulted in
// page by page each time, which for 4 MiB takes longer (1 ms) than a product of 256 x 448 x 448.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>

namespace quaver::cpu {

// Grows, never shrinks; aligned to a cache line.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(bytes_); }

  template <class T>
  T* get(int64_t count) {
    const size_t wanted = (size_t(count) * sizeof(T) + 63) / 64 * 64;
    if (wanted > size_) {
      std::free(bytes_);
      size_ = 0;
      bytes_ = std::aligned_alloc(64, wanted);
      if (!bytes_) throw std::bad_alloc();
      size_ = wanted;
    }
    return static_cast<T*>(bytes_);
  }

 private:
  void* bytes_ = nullptr;
  size_t size_ = 0;
};

// One for each use, so that two uses at a time never share one.
enum class Use {
  kPackedA,
  kPackedB,
  kTile,
  kRows,
  kPairs,
  kPanel,
  kWindow,
  kExchange,
  kFactors,
  kLeft,
  kRight,
  kScaled,
  kSamples,
  kSums,
  kLine,
  kProducts,
  kNarrow,
  kUp,
  kCount
};

template <class T>
T* workspace(Use use, int64_t count) {
  static thread_local Workspace all[size_t(Use::kCount)];
  return all[size_t(use)].template get<T>(count);
}

}  // namespace quaver::cpu
