// Who touched a byte last, and whether that and a new access can happen at the same time on a GPU.
#pragma once
#include <cstdint>

namespace quaver::emulator {

// How far the accesses that one record stands for are spread: over one thread, one warp, one block or several blocks.
enum Spread : uint64_t { kThread, kWarpWide, kBlockWide, kGrid };

// 64 bits, because each byte of memory has two. The counters wrap around; they are only compared for equality, so that
// a race between two barriers that are a multiple of 4096 apart is taken for an ordered access.
struct Access {
  uint64_t block : 27;  // 0: nobody yet
  uint64_t phase : 12;
  uint64_t warp_phase : 11;
  uint64_t thread : 10;
  uint64_t spread : 2;
  uint64_t atomic : 1;
  uint64_t copying : 1;  // a write: by an asynchronous copy that its thread has not waited for
};
static_assert(sizeof(Access) == 8);

// The last write, and all reads (or atomic updates) since the last barrier in one record.
struct Cell {
  Access write, read;
};

inline bool same_warp(const Access& a, const Access& b) { return a.thread / 32 == b.thread / 32; }

// Nothing orders `past` before `now`: no barrier, not the same thread. Accesses of blocks before `first` do not count.
inline bool concurrent(const Access& past, const Access& now, uint32_t first) {
  if (past.block < first) return false;
  if (past.block != now.block || past.spread == kGrid) return true;
  if (past.phase != now.phase) return false;
  if (!same_warp(past, now) || past.spread == kBlockWide) return true;
  if (past.warp_phase != now.warp_phase) return false;
  return past.thread != now.thread || past.spread == kWarpWide;
}

// One record for `past` and `now`, which do not conflict: whatever conflicts with one of them conflicts with it.
inline Access merged(const Access& past, Access now, uint32_t first) {
  if (past.block < first) return now;
  if (past.block != now.block || past.spread == kGrid) {
    now.spread = kGrid;
  } else if (past.phase == now.phase) {
    if (!same_warp(past, now) || past.spread == kBlockWide) {
      now.spread = kBlockWide;
    } else if (past.warp_phase == now.warp_phase && (past.thread != now.thread || past.spread == kWarpWide)) {
      now.spread = kWarpWide;
    }
  }
  return now;
}

}  // namespace quaver::emulator
