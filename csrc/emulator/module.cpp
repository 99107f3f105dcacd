#include "module.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>

#include "report.h"

namespace quaver::emulator {

namespace {

thread_local volatile char anchor;  // makes sure that there is thread-local storage

struct Found {
  Module module;
  ThreadLocal thread_local_storage;
};

int visit(dl_phdr_info* info, size_t, void* result) {
  uintptr_t end = info->dlpi_addr;
  size_t thread_local_bytes = 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type == PT_LOAD) end = std::max<uintptr_t>(end, info->dlpi_addr + header.p_vaddr + header.p_memsz);
    if (header.p_type == PT_TLS) thread_local_bytes = header.p_memsz;
  }
  const uintptr_t here = reinterpret_cast<uintptr_t>(&this_module);
  if (here < info->dlpi_addr || here >= end) return 0;
  *static_cast<Found*>(result) = {{info->dlpi_name, info->dlpi_addr, end},
                                  {static_cast<char*>(info->dlpi_tls_data), thread_local_bytes}};
  return 1;
}

Found look_up() {
  Found found = {};
  dl_iterate_phdr(visit, &found);
  return found;
}

// addr2line -a: for each address a line "0x...", then one line for each level of inlining, innermost first.
std::string run_addr2line(const std::vector<const void*>& pcs) {
  std::string command = "addr2line -a -i -e '" + this_module().path + "'", output;
  // A return address may lie on the next source line: one byte less is inside the call.
  for (const void* pc : pcs)
    command += format(" 0x%zx", size_t(reinterpret_cast<uintptr_t>(pc) - this_module().base - 1));
  const std::unique_ptr<FILE, int (*)(FILE*)> pipe(popen((command + " 2>/dev/null").c_str(), "r"), pclose);
  char line[4096];
  while (pipe && std::fgets(line, sizeof line, pipe.get())) output += line;
  return output;
}

bool is_kernel_source(const std::string& line) {
  return line.compare(0, 2, "??") != 0 && short_path(line).compare(0, 14, "csrc/emulator/") != 0;
}

}  // namespace

const Module& this_module() {
  static const Module module = look_up().module;
  return module;
}

ThreadLocal thread_local_storage() {
  anchor = 0;
  return look_up().thread_local_storage;
}

std::string short_path(const std::string& path) {
  const std::string root = QUAVER_SOURCE_ROOT "/", normal = std::filesystem::path(path).lexically_normal();
  return normal.compare(0, root.size(), root) == 0 ? normal.substr(root.size()) : normal;
}

std::vector<std::string> source_lines(const std::vector<const void*>& pcs) {
  std::vector<std::string> lines;
  if (pcs.empty()) return lines;
  const std::string output = run_addr2line(pcs);
  for (size_t begin = 0, end; (end = output.find('\n', begin)) != std::string::npos; begin = end + 1) {
    std::string line = output.substr(begin, end - begin);
    line = line.substr(0, line.find(" (discriminator"));
    if (line.compare(0, 2, "0x") == 0) {
      lines.emplace_back();
    } else if (!lines.empty() && is_kernel_source(line)) {
      lines.back() += (lines.back().empty() ? "" : ", inlined into ") + short_path(line);
    }
  }
  lines.resize(pcs.size());
  for (size_t i = 0; i < pcs.size(); i++) {
    const size_t offset = reinterpret_cast<uintptr_t>(pcs[i]) - this_module().base;
    if (lines[i].empty()) lines[i] = format("%s+0x%zx", this_module().path.c_str(), offset);
  }
  return lines;
}

}  // namespace quaver::emulator
