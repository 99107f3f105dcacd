# The target torch_stable: torch's headers restricted to the Stable ABI, and libtorch.so.
if(NOT TORCH_DIR)
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c
            "import importlib.util, os; print(os.path.dirname(importlib.util.find_spec('torch').origin))"
    OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
file(STRINGS "${TORCH_DIR}/version.py" TORCH_VERSION REGEX "^__version__")
string(REGEX REPLACE ".*'(.*)'.*" "\\1" TORCH_VERSION "${TORCH_VERSION}")

# Without TORCH_TARGET_VERSION a build against 2.13's headers does not load in 2.11.
set(TORCH_TARGET 0x020b000000000000 CACHE STRING "the oldest torch that the binaries load in: 2.11")
add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${TORCH_DIR}/include")
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${TORCH_TARGET} TORCH_STABLE_ONLY)
# libtorch.so holds no code of its own: it needs libtorch_cpu.so and, in a CUDA torch, libtorch_cuda.so. It is loaded
# before our libraries are, so no RPATH is wanted; --no-as-needed because torch loads its libraries RTLD_LOCAL.
target_link_libraries(torch_stable INTERFACE -Wl,--no-as-needed "${TORCH_DIR}/lib/libtorch.so" -Wl,--as-needed)
