// What the fault kernels share: one C function each, that Python calls with numpy arrays.
#pragma once
#include <cstdio>
#include <stdexcept>

#include "cuda/gpu.h"

#define QUAVER_TEST extern "C" __attribute__((visibility("default")))

// Returns what() of a launch that is refused, "" otherwise: no exception can leave a C function.
template <class F>
const char* message_of(F&& launch) {
  static char message[512];
  message[0] = 0;
  try {
    launch();
  } catch (const std::runtime_error& error) {
    std::snprintf(message, sizeof message, "%s", error.what());
  }
  return message;
}
