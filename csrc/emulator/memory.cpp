#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "block.h"
#include "module.h"
#include "regions.h"
#include "report.h"
#include "shadow.h"

namespace quaver::emulator {

namespace {

enum class Space { kShared, kGlobal };

struct Region {
  uintptr_t begin = 0, end = 0;
  std::string name;
  Space space = Space::kGlobal;
  Use use = Use::kOutput;
  std::unique_ptr<Cell[], decltype(&std::free)> cells{nullptr, std::free};  // none for an input: nothing can race

  bool contains(uintptr_t address) const { return address - begin < end - begin; }

  // calloc: the pages of a large region that nobody touches cost nothing.
  void clear_cells() {
    cells.reset(static_cast<Cell*>(std::calloc(std::max<size_t>(end - begin, 1), sizeof(Cell))));
    if (!cells) throw std::bad_alloc();
  }
};

std::map<uintptr_t, Region> regions;  // of global memory, by address
Region dynamic_region, static_region;
std::unique_ptr<unsigned char[], decltype(&std::free)> dynamic_bytes{nullptr, std::free};
uintptr_t call_begin = 0, call_end = 0;

Region* global_region(uintptr_t address) {
  auto after = regions.upper_bound(address);
  return after != regions.begin() && (--after)->second.contains(address) ? &after->second : nullptr;
}

Region* find(uintptr_t address) {
  if (dynamic_region.contains(address)) return &dynamic_region;
  if (static_region.contains(address)) return &static_region;
  return global_region(address);
}

const char* verb(Touch touch) {
  return touch == Touch::kRead ? "reads" : touch == Touch::kWrite ? "writes" : "updates atomically";
}

std::string access_text(Touch touch, size_t bytes) {
  return format("thread %d %s %zu bytes", number_of(*running), verb(touch), bytes);
}

[[noreturn]] void report_and_stop(Fault fault, const void* pc, const std::string& details) {
  report(fault, pc, details);
  stop();
}

[[noreturn]] void report_out_of_bounds(Touch touch, uintptr_t address, size_t bytes, const void* pc) {
  const Region* nearest = nullptr;
  const auto below = [&](const Region& region) {
    if (region.begin < region.end && region.end <= address && (!nearest || nearest->end < region.end))
      nearest = &region;
  };
  below(dynamic_region);
  below(static_region);
  for (const auto& [begin, region] : regions) below(region);
  std::string where = ", below all known memory";
  if (nearest) where = format(", %zu bytes past the end of %s", size_t(address - nearest->end), nearest->name.c_str());
  report_and_stop(Fault::kOutOfBounds, pc, access_text(touch, bytes) + where);
}

// Memory that kernels may read besides the regions: the parameters, and the library's own constants.
bool is_readable(uintptr_t address) {
  return address - call_begin < call_end - call_begin || this_module().contains(address);
}

void report_race(const Region& region, Touch touch, const Cell& cell, const Access& past, size_t offset,
                 const void* pc) {
  const bool past_write = &past == &cell.write;
  const char* const did = !past_write ? "read" : past.atomic ? "updated atomically" : "wrote";
  const int self = number_of(*running);
  std::string other = format("thread %d", int(past.thread));
  Fault fault = region.space == Space::kShared ? Fault::kSharedRace : Fault::kGlobalRace;
  if (past.spread == kGrid || past.block != block.serial) {
    fault = Fault::kBlockRace;
    other += " of another block";
  } else if (int(past.thread) == self) {
    other = "another thread";  // the cell keeps the last of several
  }
  report(fault, pc,
         format("thread %d %s what %s %s with no barrier between: byte %zu of %s", self, verb(touch), other.c_str(),
                did, offset, region.name.c_str()));
}

void check_cells(Region& region, Touch touch, uintptr_t address, size_t bytes, const void* pc) {
  const int thread = number_of(*running);
  Access now = {};
  now.block = block.serial;
  now.phase = block.phase;
  now.warp_phase = block.warp_phase[thread / kWarp];
  now.thread = unsigned(thread);
  now.atomic = touch == Touch::kAtomic;
  // Nothing that earlier blocks did to shared memory concerns this one, nothing that earlier launches did to any
  // memory.
  const uint32_t first = region.space == Space::kShared ? block.serial : block.first_of_launch;
  const uint32_t first_contents = region.space == Space::kShared ? block.serial : 1;
  const bool needs_contents = touch != Touch::kWrite && region.use != Use::kUpdated;
  const size_t offset = address - region.begin;
  bool reported = false;
  const auto report_once = [&](const Cell& cell, const Access& past, size_t i) {
    if (!std::exchange(reported, true)) report_race(region, touch, cell, past, i, pc);
  };
  for (size_t i = offset; i < offset + bytes; i++) {
    Cell& cell = region.cells[i];
    const bool both_atomic = now.atomic && cell.write.atomic;
    if (needs_contents && cell.write.block < first_contents) {
      report(Fault::kUninitialised, pc,
             access_text(touch, bytes) + format(", of which nobody wrote byte %zu of %s", i, region.name.c_str()));
      return;
    }
    if (!both_atomic && concurrent(cell.write, now, first)) report_once(cell, cell.write, i);
    if (touch == Touch::kRead) {
      cell.read = merged(cell.read, now, first);
      continue;
    }
    if (concurrent(cell.read, now, first)) report_once(cell, cell.read, i);
    cell.write = both_atomic ? merged(cell.write, now, first) : now;
  }
}

}  // namespace

void check(Touch touch, const void* pointer, size_t bytes, bool aligned, const void* pc) {
  if (!in_kernel) return;
  const OutsideKernel outside;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t stack = reinterpret_cast<uintptr_t>(stack_of(number_of(*running)));
  if (address - stack < kStackBytes) return;
  Region* const region = find(address);
  if (!region) {
    if (touch == Touch::kRead && is_readable(address)) return;
    if (address - reinterpret_cast<uintptr_t>(stack_of(0)) < kMaxThreads * kStackBytes) {
      report_and_stop(Fault::kForeignStack, pc, access_text(touch, bytes));
    }
    report_out_of_bounds(touch, address, bytes, pc);
  }
  if (address + bytes > region->end) {
    report_and_stop(Fault::kOutOfBounds, pc,
                    access_text(touch, bytes) + format(" across the end of %s", region->name.c_str()));
  }
  if (aligned && address % bytes != 0) {
    report_and_stop(Fault::kMisaligned, pc,
                    access_text(touch, bytes) +
                        format(" at byte %zu of %s", size_t(address - region->begin), region->name.c_str()));
  }
  statistics.accesses++;
  if (region->use != Use::kInput) return check_cells(*region, touch, address, bytes, pc);
  if (touch != Touch::kRead) {
    report_and_stop(Fault::kReadOnly, pc, access_text(touch, bytes) + " of " + region->name);
  }
}

void start_launch(size_t shared_bytes, const void* call, size_t call_bytes) {
  call_begin = reinterpret_cast<uintptr_t>(call);
  call_end = call_begin + call_bytes;

  constexpr size_t kAlignment = 128;
  const size_t allocated = (shared_bytes / kAlignment + 1) * kAlignment;
  dynamic_bytes.reset(static_cast<unsigned char*>(std::aligned_alloc(kAlignment, allocated)));
  dynamic_region.begin = reinterpret_cast<uintptr_t>(dynamic_bytes.get());
  dynamic_region.end = dynamic_region.begin + shared_bytes;
  dynamic_region.name = "dynamic shared memory";
  dynamic_region.space = Space::kShared;
  dynamic_region.clear_cells();

  const ThreadLocal shared = thread_local_storage();
  static_region.begin = reinterpret_cast<uintptr_t>(shared.begin);
  static_region.end = static_region.begin + shared.bytes;
  static_region.name = "static shared memory";
  static_region.space = Space::kShared;
  static_region.clear_cells();
}

void start_shared_memory() {
  for (const Region* region : {&dynamic_region, &static_region}) {
    std::memset(reinterpret_cast<void*>(region->begin), 0xff, region->end - region->begin);
  }
}

unsigned char* dynamic_shared() { return dynamic_bytes.get(); }

void clear_regions() { regions.clear(); }

void register_region(void* pointer, size_t bytes, const char* name, Use use) {
  if (bytes == 0) return;
  Region region;
  region.begin = reinterpret_cast<uintptr_t>(pointer);
  region.end = region.begin + bytes;
  region.name = name;
  region.use = use;
  if (use != Use::kInput) region.clear_cells();
  if (use == Use::kOutput) std::memset(pointer, 0xff, bytes);
  auto overlapped = regions.lower_bound(region.begin);
  if (overlapped != regions.begin() && std::prev(overlapped)->second.contains(region.begin)) --overlapped;
  while (overlapped != regions.end() && overlapped->first < region.end) overlapped = regions.erase(overlapped);
  regions.emplace(region.begin, std::move(region));
}

}  // namespace quaver::emulator
