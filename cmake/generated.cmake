# The table of coefficients is Python data (kernels/philox/coefficients.py); C++ reads it through a generated header.
set(QUAVER_ROOT "${CMAKE_CURRENT_LIST_DIR}/..")
set(QUAVER_GENERATED_INCLUDE "${CMAKE_BINARY_DIR}/generated")
add_custom_command(
  OUTPUT "${QUAVER_GENERATED_INCLUDE}/normal_coefficients.h"
  COMMAND "${CMAKE_COMMAND}" -E make_directory "${QUAVER_GENERATED_INCLUDE}"
  COMMAND "${Python3_EXECUTABLE}" "${QUAVER_ROOT}/kernels/philox/coefficients.py"
          "${QUAVER_GENERATED_INCLUDE}/normal_coefficients.h"
  DEPENDS "${QUAVER_ROOT}/kernels/philox/coefficients.py")
add_custom_target(quaver_generated DEPENDS "${QUAVER_GENERATED_INCLUDE}/normal_coefficients.h")

# What every target of ours includes from.
add_library(quaver_headers INTERFACE)
target_include_directories(quaver_headers INTERFACE "${QUAVER_ROOT}/csrc" "${QUAVER_GENERATED_INCLUDE}")
add_dependencies(quaver_headers quaver_generated)
