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
#include "traffic.h"

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

[[noreturn]] void report_and_stop(Fault fault, Site site, const std::string& details) {
  report(fault, site, details);
  stop();
}

[[noreturn]] void report_out_of_bounds(Touch touch, uintptr_t address, size_t bytes, Site site) {
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
  report_and_stop(Fault::kOutOfBounds, site, access_text(touch, bytes) + where);
}

// Memory that kernels may read besides the regions: the parameters, and the library's own constants.
bool is_readable(uintptr_t address) {
  return address - call_begin < call_end - call_begin || this_module().contains(address);
}

void report_race(const Region& region, Touch touch, const Cell& cell, const Access& past, size_t offset, Site site) {
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
  report(fault, site,
         format("thread %d %s what %s %s with no barrier between: byte %zu of %s", self, verb(touch), other.c_str(),
                did, offset, region.name.c_str()));
}

Access access_now() {
  const int thread = number_of(*running);
  Access now = {};
  now.block = block.serial;
  now.phase = block.phase;
  now.warp_phase = block.warp_phase[thread / kWarp];
  now.thread = unsigned(thread);
  return now;
}

void check_cells(Region& region, Touch touch, uintptr_t address, size_t bytes, Site site) {
  Access now = access_now();
  now.atomic = touch == Touch::kAtomic;
  // Nothing that earlier blocks did to shared memory concerns this one, nothing that earlier launches did to any
  // memory.
  const uint32_t first = region.space == Space::kShared ? block.serial : block.first_of_launch;
  const uint32_t first_contents = region.space == Space::kShared ? block.serial : 1;
  const bool needs_contents = touch != Touch::kWrite && region.use != Use::kUpdated;
  const size_t offset = address - region.begin;
  bool reported = false;
  const auto report_once = [&](const Cell& cell, const Access& past, size_t i) {
    if (!std::exchange(reported, true)) report_race(region, touch, cell, past, i, site);
  };
  for (size_t i = offset; i < offset + bytes; i++) {
    Cell& cell = region.cells[i];
    const bool both_atomic = now.atomic && cell.write.atomic;
    if (needs_contents && cell.write.block < first_contents) {
      report(Fault::kUninitialised, site,
             access_text(touch, bytes) + format(", of which nobody wrote byte %zu of %s", i, region.name.c_str()));
      return;
    }
    if (cell.write.copying && cell.write.block == block.serial) {
      report(Fault::kNotAwaited, site,
             access_text(touch, bytes) + format(" that a copy of thread %d, which has not waited for it, writes: byte "
                                                "%zu of %s",
                                                int(cell.write.thread), i, region.name.c_str()));
      if (touch == Touch::kRead) continue;
    } else if (!both_atomic && concurrent(cell.write, now, first))
      report_once(cell, cell.write, i);
    if (touch == Touch::kRead) {
      cell.read = merged(cell.read, now, first);
      continue;
    }
    if (concurrent(cell.read, now, first)) report_once(cell, cell.read, i);
    cell.write = both_atomic ? merged(cell.write, now, first) : now;
  }
}

}  // namespace

void check(Touch touch, const void* pointer, size_t bytes, bool aligned, Site site) {
  if (!in_kernel) return;
  const OutsideKernel outside;
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  const uintptr_t stack = reinterpret_cast<uintptr_t>(stack_of(number_of(*running)));
  if (address - stack < kStackBytes) return;
  Region* const region = find(address);
  if (!region) {
    if (touch == Touch::kRead && is_readable(address)) return;
    if (address - reinterpret_cast<uintptr_t>(stack_of(0)) < kMaxThreads * kStackBytes) {
      report_and_stop(Fault::kForeignStack, site, access_text(touch, bytes));
    }
    report_out_of_bounds(touch, address, bytes, site);
  }
  if (address + bytes > region->end) {
    report_and_stop(Fault::kOutOfBounds, site,
                    access_text(touch, bytes) + format(" across the end of %s", region->name.c_str()));
  }
  if (aligned && address % bytes != 0) {
    report_and_stop(Fault::kMisaligned, site,
                    access_text(touch, bytes) +
                        format(" at byte %zu of %s", size_t(address - region->begin), region->name.c_str()));
  }
  statistics.accesses++;
  count_access(touch, region->space == Space::kGlobal ? region->begin : 0, address, bytes, site);
  if (region->use != Use::kInput) return check_cells(*region, touch, address, bytes, site);
  if (touch != Touch::kRead) {
    report_and_stop(Fault::kReadOnly, site, access_text(touch, bytes) + " of " + region->name);
  }
}

namespace {

Region* shared_region(uintptr_t address, size_t bytes) {
  for (Region* region : {&dynamic_region, &static_region}) {
    if (region->contains(address) && address + bytes <= region->end) return region;
  }
  return nullptr;
}

[[noreturn]] void report_outside_kernel(Fault fault, Site site, const std::string& details) {
  in_kernel = false;
  report_and_stop(fault, site, details);
}

}  // namespace

void check_shared_row(const void* row, size_t bytes, Site site) {
  if (!shared_region(reinterpret_cast<uintptr_t>(row), bytes)) {
    report_outside_kernel(
        Fault::kOutOfBounds, site,
        format("thread %d reads %zu bytes that are not in shared memory", number_of(*running), bytes));
  }
  check(Touch::kRead, row, bytes, true, site);
}

void check_copy(const void* to, const void* from, size_t copied, int bytes, Site site) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(to);
  if (reinterpret_cast<uintptr_t>(from) % copied != 0) {
    report_outside_kernel(
        Fault::kMisaligned, site,
        format("thread %d copies from an address that is no multiple of %zu", number_of(*running), copied));
  }
  Region* const region = shared_region(address, copied);
  if (!region) {
    report_outside_kernel(
        Fault::kOutOfBounds, site,
        format("thread %d copies to %zu bytes that are not in shared memory", number_of(*running), copied));
  }
  if (bytes > 0) check(Touch::kRead, from, size_t(bytes), false, site);
  check(Touch::kWrite, to, copied, true, site);
  for (size_t i = address - region->begin; i < address - region->begin + copied; i++) {
    region->cells[i].write.copying = true;
  }
}

void complete_copy(const void* to, size_t copied) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(to);
  const Region* const region = find(address);
  for (size_t i = address - region->begin; i < address - region->begin + copied; i++) {
    region->cells[i].write = access_now();
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
