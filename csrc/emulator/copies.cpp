#include "copies.h"

#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "block.h"
#include "memory.h"
#include "report.h"

namespace quaver::emulator {

namespace {

struct Copy {
  char* to;
  const char* from;
  int size, bytes;
  bool done;
};
using Group = std::vector<Copy>;

struct ThreadCopies {
  Group open;
  std::deque<Group> groups;
};
std::vector<ThreadCopies> all;
Moment moment = Moment::kEarly;
std::minstd_rand generator;

void carry_out(Copy& copy) {
  if (!copy.done) {
    std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    std::memset(copy.to + copy.bytes, 0, size_t(copy.size - copy.bytes));
  }
  copy.done = true;
}

ThreadCopies& of_running() { return all[size_t(number_of(*running))]; }

}  // namespace

void set_moment(Moment moment_, unsigned seed) {
  moment = moment_;
  generator.seed(seed + 1);
}

void start_copies() { all.assign(block.threads.size(), {}); }

void start_copy(void* to, const void* from, int size, int bytes, Location location) {
  check_copy(to, from, size, bytes, location);
  const OutsideKernel outside;
  Copy copy = {static_cast<char*>(to), static_cast<const char*>(from), size, bytes, false};
  const bool early = moment == Moment::kEarly || (moment == Moment::kRandom && generator() % 2);
  if (early) carry_out(copy);
  of_running().open.push_back(copy);
}

void commit_copies() {
  const OutsideKernel outside;
  ThreadCopies& copies = of_running();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

void await_copies(int left) {
  const OutsideKernel outside;
  ThreadCopies& copies = of_running();
  while (int(copies.groups.size()) > left) {
    for (Copy& copy : copies.groups.front()) {
      carry_out(copy);
      complete_copy(copy.to, copy.size);
    }
    copies.groups.pop_front();
  }
}

}  // namespace quaver::emulator
