// quaver.kernels._native: what was compiled, the SIMD level, and the raw stream as numpy. Needs no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>

#include "common/philox.h"
#include "cpu/philox_loops.h"

namespace py = pybind11;
namespace cpu = quaver::cpu;

namespace {

py::dict build_facts() {
  py::dict facts;
  facts["compiler"] = std::string(
#if defined(__clang__)
      "clang "
#elif defined(__GNUC__)
      "g++ "
#endif
      __VERSION__);
  facts["torch"] = QUAVER_BUILD_TORCH;
  facts["build_type"] = QUAVER_BUILD_TYPE;
  py::list levels;
  levels.append("base");
#if defined(__x86_64__) && !defined(QUAVER_PORTABLE)
  levels.append("v3");
  levels.append("v4");
#endif
  facts["simd_levels"] = levels;
  return facts;
}

cpu::Level level_named(const std::string& name) {
  cpu::Level level;
  if (!cpu::level_from_name(name.c_str(), level)) {
    throw std::invalid_argument("level " + name + ": expected base, v3, v4 or amx");
  }
  return level;
}

// One block of Philox-4x32-10: any counter of four words, any key of two.
py::array_t<uint32_t> philox_4x32(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const auto x =
      quaver::philox(uint64_t(counter[1]) << 32 | counter[0], counter[2], counter[3], uint64_t(key[1]) << 32 | key[0]);
  return py::array_t<uint32_t>(4, x.w);
}

py::array_t<float> noise(int64_t count, uint64_t seed, uint32_t stream, uint32_t domain, uint64_t offset) {
  if (count < 0) throw std::invalid_argument("count must not be negative");
  if ((domain & 255u) > quaver::kUniform) throw std::invalid_argument("domain must be 0, 1 or 2, or that plus 256");
  py::array_t<float> out(count);
  cpu::philox_loops().fill(out.mutable_data(), count, {seed, stream, domain}, offset);
  return out;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Build facts, the SIMD level, and quaver's noise stream as numpy arrays.";
  m.def("build_facts", &build_facts, "The compiler, torch version and instruction sets of this build.");
  m.def("detected_simd", [] { return cpu::level_name(cpu::detected_level()); }, "The best level of this machine.");
  m.def("current_simd", [] { return cpu::level_name(cpu::current_level()); }, "The level in use by this module.");
  m.def(
      "cap_simd", [](const std::string& name) { cpu::cap_level(level_named(name)); }, py::arg("level"),
      "Cap the level that this module uses.");
  m.def("philox_4x32", &philox_4x32, py::arg("counter"), py::arg("key"), "The four words of one counter.");
  m.def("noise", &noise, py::arg("count"), py::arg("seed"), py::arg("stream") = 0, py::arg("domain") = 0,
        py::arg("offset") = 0, "Elements offset .. offset + count - 1 of one source, float32.");
}
