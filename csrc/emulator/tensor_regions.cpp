// Strided tensors as regions.
#include <algorithm>
#include <string>
#include <vector>

#include "regions.h"
#include "report.h"

namespace quaver::emulator {

void register_tensor(const void* data, size_t element_bytes, const int64_t* sizes, const int64_t* strides, int64_t dims,
                     Use use) {
  struct Dimension {
    int64_t stride, size;
  };
  std::vector<Dimension> outer;
  for (int64_t d = 0; d < dims; d++) {
    if (sizes[d] == 0) return;
    if (sizes[d] > 1 && strides[d] > 0) outer.push_back({strides[d], sizes[d]});
  }
  // From the smallest stride up, dimensions that continue each other are one run, in whatever order the tensor names
  // them.
  std::sort(outer.begin(), outer.end(), [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
  int64_t run = 1, runs = 1;
  while (!outer.empty() && outer.front().stride == run) {
    run *= outer.front().size;
    outer.erase(outer.begin());
  }
  for (const Dimension& dimension : outer) runs *= dimension.size;

  const char* const kind = use == Use::kInput ? "input" : use == Use::kOutput ? "output" : "updated";
  std::string shape;
  for (int64_t d = 0; d < dims; d++) shape += (d ? ", " : "") + std::to_string(sizes[d]);
  const std::string name = format("%s tensor [%s] of %zu-byte elements", kind, shape.c_str(), element_bytes);
  char* const begin = static_cast<char*>(const_cast<void*>(data));
  for (int64_t i = 0; i < runs; i++) {
    int64_t offset = 0, rest = i;
    for (const Dimension& dimension : outer) {
      offset += rest % dimension.size * dimension.stride;
      rest /= dimension.size;
    }
    register_region(begin + offset * int64_t(element_bytes), size_t(run) * element_bytes, name.c_str(), use);
  }
}

}  // namespace quaver::emulator
