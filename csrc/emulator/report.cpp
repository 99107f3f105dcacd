#include "report.h"

#include <cstdarg>
#include <cstdio>
#include <set>
#include <utility>
#include <vector>

#include "block.h"
#include "module.h"

namespace quaver::emulator {

namespace {

constexpr size_t kMaxReports = 100;

struct Report {
  Fault fault;
  const void* pc;     // looked up when the reports are read: addr2line takes 10 ms or more
  std::string place;  // where there is no pc
  std::string details;
};
std::vector<Report> reports;
std::set<std::pair<Fault, const void*>> reported_pcs;
std::set<std::pair<Fault, std::string>> reported_places;

const char* name_of(Fault fault) {
  switch (fault) {
    case Fault::kSharedRace:
      return "race in shared memory";
    case Fault::kGlobalRace:
      return "race in global memory";
    case Fault::kBlockRace:
      return "race between blocks";
    case Fault::kOutOfBounds:
      return "out of bounds";
    case Fault::kMisaligned:
      return "misaligned access";
    case Fault::kUninitialised:
      return "uninitialised read";
    case Fault::kReadOnly:
      return "write to an input";
    case Fault::kForeignStack:
      return "access to another thread's local memory";
    case Fault::kDivergentBarrier:
      return "divergent barrier";
    case Fault::kEarlyExit:
      return "exit before a barrier";
    case Fault::kDeadlock:
      return "deadlock";
    case Fault::kWrongMask:
      return "wrong mask";
    case Fault::kInactiveLane:
      return "shuffle from an inactive lane";
    case Fault::kNotAwaited:
      return "copy not awaited";
  }
  return "";
}

void add(Report report) {
  if (reports.size() >= kMaxReports) return;
  report.details += format(" (block %u, %u, %u)", block.index.x, block.index.y, block.index.z);
  reports.push_back(std::move(report));
}

}  // namespace

void report(Fault fault, Site site, const std::string& details) {
  if (site.pc) {
    if (reported_pcs.emplace(fault, site.pc).second) add({fault, site.pc, "", details});
    return;
  }
  const std::string place = to_string(site.location);
  if (reported_places.emplace(fault, place).second) add({fault, nullptr, place, details});
}

std::string all_reports() {
  std::vector<const void*> pcs;
  for (const Report& report : reports) {
    if (report.pc) pcs.push_back(report.pc);
  }
  const std::vector<std::string> lines = source_lines(pcs);
  std::set<std::pair<Fault, std::string>> seen;  // an unrolled loop has several pcs on a line
  std::string text;
  size_t next = 0;
  for (const Report& report : reports) {
    const std::string place = report.pc ? lines[next++] : report.place;
    if (!seen.emplace(report.fault, place).second) continue;
    text += place + ": " + name_of(report.fault) + ": " + report.details + "\n";
  }
  return text;
}

void clear_reports() {
  reports.clear();
  reported_pcs.clear();
  reported_places.clear();
}

std::string to_string(Location location) { return short_path(location.file) + ":" + std::to_string(location.line); }

std::string format(const char* pattern, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, pattern);
  std::vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

}  // namespace quaver::emulator
