"""The CPU kernels under AddressSanitizer: every case of every op, in a process that preloads its runtime."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from op_checks import LEVELS
from package_copy import copy_package

ROOT = Path(__file__).parents[1]

RUN = """
import importlib, sys, torch
from quaver.kernels import _library, use_backend
assert _library.CPU.loaded, _library.CPU
for op in ("philox", "dropout", "perturb", "perturbed_linear", "spectral_linear", "window_attention"):
    for case in importlib.import_module(f"quaver.kernels.{op}.cases").CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            inputs = case.inputs(dtype, torch.device("cpu"))
            for name in case.differentiable:
                inputs[name] = inputs[name].detach().requires_grad_()
            with use_backend("cpp"):
                out = case.function(**inputs)
                if case.differentiable:
                    out.sum().backward()
from quaver.kernels._gemm import gemm
SIZES = ((1, 1, 1), (7, 17, 33), (17, 33, 34), (33, 31, 65), (49, 100, 257), (60, 200, 1024), (97, 193, 1500))
for rows, columns, depth in SIZES:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(dtype)
        for left in (a, a.t().contiguous().t()):
            for right in (b, b.t().contiguous().t()):
                gemm(left, right)
sys.stdout.write("clean\\n")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the checked library in place of the installed one."""
    build, source = tmp_path_factory.mktemp("asan"), tmp_path_factory.mktemp("source")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    configure = ["-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DPython3_EXECUTABLE={sys.executable}"]
    for command in ([*configure, "-DQUAVER_ASAN=ON"], ["--build", str(build), "--target", "quaver_cpu"]):
        subprocess.run(["cmake", *command], check=True, env={**os.environ, "PATH": path}, capture_output=True)
    libraries = copy_package(source)
    libraries.mkdir()
    (build / "libquaver_cpu.so").rename(libraries / "libquaver_cpu.so")
    return source


def run(code: str, source: Path, level: str) -> subprocess.CompletedProcess[str]:
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        "PYTHONPATH": str(source),
        "QUAVER_SIMD": level,
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_every_case_is_clean(source: Path, level: str) -> None:
    done = run(RUN, source, level)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "clean\n"


@pytest.mark.slow
def test_an_overrun_is_seen(source: Path) -> None:
    # The op trusts its caller: a sigma shorter than its sizes say makes the kernel read past the end.
    code = (
        "import quaver, torch\n"
        "w = torch.zeros(64, 64)\n"
        "from numpy.lib.stride_tricks import as_strided\n"
        "sigma = torch.from_numpy(as_strided(torch.zeros(64).numpy(), (1, 64, 64), (16384, 256, 4)))\n"
        "torch.ops.quaver.perturb(w, sigma, torch.tensor(1), 0, 0, 0, 0, 64)\n"
    )
    done = run(code, source, "base")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
