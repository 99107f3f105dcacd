// How host code starts a kernel.
#pragma once
#include <cstddef>
#include <tuple>

#include "vector_types.h"

namespace quaver::emulator {

using Body = void (*)(const void* call);

// Runs body(call) for every thread of every block; `call` points to call_bytes bytes that kernels may read. Throws
// std::runtime_error where a GPU would refuse the launch.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Body body, const void* call, size_t call_bytes);

// The block's dynamic shared memory.
unsigned char* dynamic_shared();

template <class... K, class... A>
void launch(void (*kernel)(K...), dim3 grid, dim3 block, size_t shared_bytes, A&&... arguments) {
  struct Call {
    void (*kernel)(K...);
    std::tuple<K...> parameters;  // converted and copied now, as a launch does
  };
  const Call call{kernel, {static_cast<K>(arguments)...}};
  run_grid(
      grid, block, shared_bytes,
      [](const void* pointer) {
        const Call& call = *static_cast<const Call*>(pointer);
        std::apply(call.kernel, call.parameters);
      },
      &call, sizeof call);
}

}  // namespace quaver::emulator
