"""Builds csrc/ with CMake and Ninja into kernels/, where the package loads it from.

QUAVER_CUDA=1|0   build the CUDA kernels or not (default: when nvcc is found)
CMAKE_ARGS        more arguments for cmake, such as -DCMAKE_CUDA_ARCHITECTURES=90
MAX_JOBS          parallel compile jobs
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

missing = [name for name in ("torch", "cmake", "ninja", "pybind11") if importlib.util.find_spec(name) is None]
if missing:
    raise SystemExit(
        f"\nquaver is compiled against the torch of your environment, and this build sees no {', '.join(missing)}.\n"
        "Type one of these:\n"
        "    make install                               a new .venv with a CPU torch and everything else\n"
        "    pip install 'setuptools>=77' cmake ninja pybind11 && pip install --no-build-isolation -e .\n"
        "                                               where torch >= 2.11 is installed\n"
    )


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = Path(home) / "bin" / "nvcc"
    return str(nvcc) if nvcc.exists() else shutil.which("nvcc")


def cuda_compiler() -> str | None:
    """The nvcc to build with, None to build without CUDA."""
    wanted = os.environ.get("QUAVER_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"QUAVER_CUDA={wanted!r}: expected 0 or 1")
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        raise SystemExit("QUAVER_CUDA=1, but there is no nvcc: set CUDA_HOME")
    return nvcc


def first_error(output: str) -> str:
    """The first line of a build's output that speaks of an error, with the two lines after it."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), len(lines) - 1)
    return " ".join(lines[first : first + 3])


class CMakeBuild(build_ext):
    """The one 'extension' stands for the whole CMake project."""

    def run(self) -> None:
        nvcc = cuda_compiler()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        in_place = self.inplace or self.editable_mode
        destination = ROOT / "kernels" if in_place else Path(self.build_lib).resolve() / "quaver" / "kernels"
        failure = ""
        try:
            self.compile(build, nvcc)
        except subprocess.CalledProcessError as error:
            if nvcc is None or os.environ.get("QUAVER_CUDA") == "1":
                raise
            # nvcc was only found, not asked for: the CPU part is worth having, and `quaver info` names what is missing.
            failure = f"the build with {nvcc} failed: {first_error(error.output)}"
            shutil.rmtree(build)
            self.compile(build, None)
        shutil.rmtree(destination / "_lib", ignore_errors=True)
        self.cmake("--install", str(build), "--prefix", str(destination))
        if failure:
            (destination / "_lib" / "cuda_build_error.txt").write_text(f"{failure} (QUAVER_CUDA=1 shows the errors)")

    def compile(self, build: Path, nvcc: str | None) -> None:
        configure = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]
        configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DQUAVER_CUDA={'ON' if nvcc else 'OFF'}"]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        configure += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS")
        self.cmake(*configure)
        self.cmake("--build", str(build), *(["-j", jobs] if jobs else []))

    def cmake(self, *arguments: str) -> None:
        # The environment's own cmake and ninja come first, whether it is activated or not.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        environment = {**os.environ, "PATH": path}
        done = subprocess.run(
            ["cmake", *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        sys.stdout.write(done.stdout)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, ["cmake", *arguments], done.stdout)

    # setuptools must not look for outputs that it did not make, nor copy any back into the tree.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        sources = [ROOT / "CMakeLists.txt", *(ROOT / "cmake").iterdir(), *(ROOT / "csrc").rglob("*")]
        return [str(path.relative_to(ROOT)) for path in sources if path.is_file()]


setup(ext_modules=[Extension("quaver.kernels._lib", sources=[])], cmdclass={"build_ext": CMakeBuild})
