"""The path law of docs/architecture.md, the layers, and the names that must not be importable."""

import ast
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/op.py"))
#: Of the CPU kernels' GEMM, which is no op of its own.
SHARED = {"gemm", "models"}
#: Of window_attention's family, each with kernels of its own: compiled apart, in half the time.
FAMILY = {"window_exchange", "njx_attention"}
#: What imports Triton beside an op's triton_*.py.
TRITON = {"_triton.py", "_resources.py", "_machine_code.py"}


def test_there_are_ops() -> None:
    assert {"philox", "dropout", "perturb"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_its_files(op: str) -> None:
    expected = [f"kernels/{op}/{name}" for name in ("README.md", "op.py", "reference.py", "tuning.py", "cases.py")]
    expected += [f"csrc/cpu/{op}.cpp", f"tests/test_{op}.py", f"benchmarks/bench_{op}.py"]
    expected += [f"kernels/{op}/triton_kernels.py", f"csrc/cuda/{op}.cu"]
    assert not [path for path in expected if not (ROOT / path).is_file()]


def test_no_file_of_an_op_is_without_its_op() -> None:
    found = {path.stem for folder in ("csrc/cuda", "kernels") for path in (ROOT / folder).glob("*.cu")}
    found |= {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert found <= {*OPS, *SHARED, *FAMILY}


@pytest.mark.parametrize("folder, suffixes", [("cpu", {".h", ".cpp"}), ("cuda", {".h", ".cuh"})])
def test_no_type_is_defined_twice(folder: str, suffixes: set[str]) -> None:
    """A library is one namespace: of two types of a name the linker keeps one's templates for both, without a word."""
    definition = re.compile(r"^(?:struct|class) (\w+)(?: final)?(?: :.*)? \{", re.MULTILINE)
    paths = [path for of in (folder, "common") for path in (ROOT / "csrc" / of).iterdir() if path.suffix in suffixes]
    found = Counter(name for path in paths for name in definition.findall(path.read_text()))
    assert found
    assert not [name for name, count in found.items() if count > 1]


def imports(path: Path) -> set[str]:
    """What a file of the package imports, as absolute module names."""
    package = ["quaver", *path.relative_to(ROOT).parent.parts] if path.is_relative_to(ROOT / "kernels") else []
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, *([node.module] if node.module else [])]))
    return names


def test_no_import_runs_upward() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        upward = [name for name in imports(path) if name.startswith(("quaver.pymodels", "quaver.cli", "benchmarks"))]
        assert not upward, (path, upward)
        if not path.name.startswith("triton_") and path.name not in TRITON:
            assert not [name for name in imports(path) if name.split(".")[0] == "triton"], path


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTHONSAFEPATH")}
    env |= {"PYTHONPATH": str(ROOT / "src"), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_the_folder_kernels_is_not_the_package_kernels() -> None:
    # From the repository root, with the root on sys.path: what transformers sees when it probes for that package.
    done = python(
        "import importlib.util, kernels\n"
        "assert kernels.__file__ is None\n"
        "assert not [name for name in vars(kernels) if not name.startswith('__')], vars(kernels)\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_transformers_imports_from_the_root() -> None:
    done = python("import transformers; from transformers import LlamaConfig, LlamaForCausalLM; LlamaConfig()")
    assert done.returncode == 0, done.stderr


def test_importing_quaver_imports_neither_triton_nor_compilers() -> None:
    done = python(
        "import sys, torch; before = set(sys.modules)\n"
        "import quaver\n"
        "new = set(sys.modules) - before\n"
        "assert not [m for m in new if m.split('.')[0] in ('triton', 'rich', 'typer', 'pybind11')], new\n"
    )
    assert done.returncode == 0, done.stderr


def test_import_takes_under_three_tenths_of_a_second_beyond_torch() -> None:
    code = "import time, torch; start = time.perf_counter(); import quaver; print(time.perf_counter() - start)"
    assert min(float(python(code).stdout) for _ in range(3)) < 0.3


def test_files_are_short_and_hold_no_path_of_one_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        if name.endswith((".py", ".cpp", ".cu", ".h", ".cuh")) and (ROOT / name).is_file():
            assert len((ROOT / name).read_text().splitlines()) <= 450, name
