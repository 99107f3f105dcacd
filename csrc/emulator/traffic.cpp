#include "traffic.h"

#include <algorithm>
#include <array>
#include <map>
#include <tuple>
#include <vector>

#include "block.h"
#include "module.h"
#include "report.h"

namespace quaver::emulator {

namespace {

constexpr size_t kSector = 32, kBank = 4, kBanks = 32, kPass = kBank * kBanks, kWidest = 16;

struct Place {
  const void* pc;
  const char* file;
  int line;
  bool global;
  Touch touch;

  bool operator<(const Place& other) const { return key() < other.key(); }

 private:
  std::tuple<const void*, const char*, int, bool, Touch> key() const { return {pc, file, line, global, touch}; }
};
struct Cost {
  uint64_t instructions, bytes, moves, least;

  void operator+=(const Cost& other) {
    instructions += other.instructions;
    bytes += other.bytes;
    moves += other.moves;
    least += other.least;
  }
};
struct Access {
  const Place* place;
  uint32_t number;  // of the lane's accesses of the place
  int lane;
  uintptr_t address;
  size_t bytes;
};
struct Warp {
  std::vector<Access> accesses;  // since its lanes last met
  std::array<std::map<const Place*, uint32_t>, kWarp> numbers;
  std::array<size_t, kWarp> last;  // of each lane's accesses, where it has any
};

bool counting = false;
std::map<Place, Cost> costs;  // its keys are the places that accesses point to
std::map<uintptr_t, Moved> regions;
std::array<Warp, kMaxWarps> warps;

using Accesses = std::vector<Access>::const_iterator;

// The numbers of the pieces of `size` bytes that the accesses touch.
std::vector<uintptr_t> pieces(Accesses begin, Accesses end, size_t size) {
  std::vector<uintptr_t> touched;
  for (; begin != end; ++begin) {
    for (uintptr_t i = begin->address / size; i <= (begin->address + begin->bytes - 1) / size; i++) {
      touched.push_back(i);
    }
  }
  std::sort(touched.begin(), touched.end());
  touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
  return touched;
}

// g++ assigns the parts of a vector that was just put together one by one, nvcc all at once: an access that goes on
// where the lane's last one, of another place, ended in the same 16 bytes is the same one.
bool continues(const Access& last, const Place& place, uintptr_t address, size_t bytes) {
  return last.place->pc != place.pc && last.place->global == place.global && last.place->touch == place.touch &&
         last.address + last.bytes == address && last.address / kWidest == (address + bytes - 1) / kWidest;
}

uint64_t fewest(size_t bytes, size_t size) { return (bytes + size - 1) / size; }

Cost cost_in_sectors(Accesses begin, Accesses end) {
  const std::vector<uintptr_t> sectors = pieces(begin, end, kSector);
  return {0, 0, sectors.size(), fewest(pieces(begin, end, 1).size(), kSector)};
}

// Lanes whose accesses together are a pass of all banks share one: 32 of 4 bytes, 16 of 8, 8 of 16. Lanes that want the
// same word have it from one read.
Cost cost_in_passes(Accesses begin, Accesses end) {
  Cost cost = {};
  const int together = int(kPass / std::clamp<size_t>(begin->bytes, kBank, kWidest));
  while (begin != end) {
    const int number = begin->lane / together;
    const Accesses next = std::find_if(begin, end, [&](const Access& a) { return a.lane / together != number; });
    std::array<uint64_t, kBanks> words = {};
    const std::vector<uintptr_t> touched = pieces(begin, next, kBank);
    for (const uintptr_t word : touched) words[word % kBanks]++;
    cost.moves += *std::max_element(words.begin(), words.end());
    cost.least += fewest(touched.size(), kBanks);
    begin = next;
  }
  return cost;
}

const char* name_of(Touch touch) {
  return touch == Touch::kRead ? "read" : touch == Touch::kWrite ? "write" : "atomic";
}

}  // namespace

void start_counting() {
  counting = true;
  for (Warp& warp : warps) warp = {};
  costs.clear();
  regions.clear();
}

void stop_counting() { counting = false; }

void count_access(Touch touch, uintptr_t region, uintptr_t address, size_t bytes, Site site) {
  if (!counting) return;
  if (region) {
    Moved& moved = regions[region];
    if (touch != Touch::kWrite) moved.read += bytes;
    if (touch != Touch::kRead) moved.written += bytes;
  }
  const Place place = {site.pc, site.location.file, site.location.line, region != 0, touch};
  const size_t thread = size_t(number_of(*running)), lane = thread % kWarp;
  Warp& warp = warps[thread / kWarp];
  if (!warp.numbers[lane].empty()) {
    Access& last = warp.accesses[warp.last[lane]];
    if (continues(last, place, address, bytes)) {
      last.bytes += bytes;
      return;
    }
  }
  const Place* const known = &costs.try_emplace(place).first->first;
  warp.last[lane] = warp.accesses.size();
  warp.accesses.push_back({known, warp.numbers[lane][known]++, int(lane), address, bytes});
}

void count_meeting(int number) {
  if (!counting) return;
  Warp& warp = warps[size_t(number)];
  std::vector<Access>& all = warp.accesses;
  const auto instruction = [](const Access& a) { return std::make_tuple(a.place, a.number); };
  std::sort(all.begin(), all.end(), [&](const Access& a, const Access& b) {
    return std::make_tuple(instruction(a), a.lane) < std::make_tuple(instruction(b), b.lane);
  });
  for (Accesses begin = all.begin(); begin != all.end();) {
    const Accesses end =
        std::find_if(begin, all.cend(), [&](const Access& a) { return instruction(a) != instruction(*begin); });
    Cost cost = begin->place->global ? cost_in_sectors(begin, end) : cost_in_passes(begin, end);
    cost.instructions = 1;
    for (Accesses access = begin; access != end; ++access) cost.bytes += access->bytes;
    costs[*begin->place] += cost;
    begin = end;
  }
  warp = {};
}

Moved moved_by(const void* begin, size_t bytes) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(begin);
  Moved sum = {};
  for (auto region = regions.lower_bound(address); region != regions.end() && region->first < address + bytes;
       ++region) {
    sum.read += region->second.read;
    sum.written += region->second.written;
  }
  return sum;
}

std::string all_traffic() {
  std::vector<const void*> pcs;
  for (const auto& [place, cost] : costs) {
    if (place.pc) pcs.push_back(place.pc);
  }
  const std::vector<std::string> lines = source_lines(pcs);
  // Variants of a template and unrolled loops have a line several times.
  std::map<std::tuple<std::string, bool, Touch>, Cost> by_line;
  size_t next = 0;
  for (const auto& [place, cost] : costs) {
    const std::string line = place.pc ? lines[next++] : to_string({place.file, place.line});
    by_line[{line, place.global, place.touch}] += cost;
  }
  std::string text;
  for (const auto& [key, cost] : by_line) {
    const auto& [line, global, touch] = key;
    text += line + format("\t%s\t%s\t%zu\t%zu\t%zu\t%zu\n", global ? "global" : "shared", name_of(touch),
                          size_t(cost.instructions), size_t(cost.bytes), size_t(cost.moves), size_t(cost.least));
  }
  return text;
}

}  // namespace quaver::emulator
