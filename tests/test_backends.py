"""Which implementation runs, and what is said when one cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from package_copy import copy_package

import quaver
from quaver.kernels import _backends, _library, use_backend, why_not

ROOT = Path(__file__).parents[1]
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_names_of_backends_are_checked() -> None:
    with (
        pytest.raises(ValueError, match="backend 'eager': expected one of reference, cpp, cuda, triton"),
        use_backend("eager"),
    ):
        pass


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    with use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run this call: the CUDA"):
        quaver.philox_normal(3, 1)


def test_the_innermost_choice_holds_and_ends_with_its_block() -> None:
    with use_backend("reference"):
        with use_backend("cpp"):
            assert _backends.choose(CPU, ("cuda",)) == "cpp"
        assert _backends.choose(CPU, ("cuda",)) == "reference"
    assert _backends.choose(CPU, ("cuda",)) == "cpp"


def test_the_choice_is_carried_to_backward_and_beyond() -> None:
    weight = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with use_backend("triton"):
        out = (quaver.perturb(weight, sigma, 1) ** 2).sum()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (grad,) = torch.autograd.grad(out, sigma, create_graph=True)
        torch.autograd.grad(grad, weight)
    ours = {event.name for event in profile.events() if event.name.startswith("quaver::")}
    assert ours == {"quaver::perturb_sigma_gradient_triton", "quaver::perturb_triton"}


def test_reasons() -> None:
    assert why_not("reference", CPU) == why_not("cpp", CPU) == ""
    assert why_not("cpp", GPU) == "the C++ kernels run on the CPU, the tensors are on cuda"
    assert why_not("triton", CPU) == ""  # this session interprets
    if not torch.version.cuda:
        assert why_not("cuda", CPU) == f"the CUDA library: torch {torch.__version__} is built without CUDA"


def test_simd_levels_can_be_capped() -> None:
    before = _library.current_simd()
    with _library.capped_simd("base"):
        assert _library.current_simd() == "base"
        assert not _library.has_bf16()
    assert _library.current_simd() == before
    with pytest.raises(ValueError, match="level 'v5': expected one of base, v3, v4, amx"), _library.capped_simd("v5"):
        pass


def python(code: str, source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(source), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def test_simd_variable() -> None:
    code = "from quaver.kernels import _library; print(_library.current_simd())"
    assert python(code, ROOT / "src", QUAVER_SIMD="base").stdout == "base\n"
    wrong = python(code, ROOT / "src", QUAVER_SIMD="avx9")
    assert "QUAVER_SIMD='avx9': expected one of base, v3, v4, amx" in wrong.stderr


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package without its compiled parts."""
    source = tmp_path_factory.mktemp("uncompiled")
    copy_package(source)
    return source


def test_without_a_compiled_library_the_references_run_and_say_so(uncompiled: Path) -> None:
    code = (
        "import quaver, torch\n"
        "w = torch.zeros(3, requires_grad=True)\n"
        "quaver.perturb(w, 0.1, 1).sum().backward(); quaver.perturb(w, 0.1, 2)\n"
        "print(quaver.philox_normal(5, 1).tolist())"
    )
    done = python(code, uncompiled)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{quaver.philox_normal(5, 1).tolist()}\n"
    assert done.stderr.count("quaver runs on its eager references") == 1
    forced = python("import quaver\nwith quaver.use_backend('cpp'): quaver.philox_normal(3, 1)", uncompiled)
    assert "backend 'cpp' cannot run this call: the C++ library is not built: there is no" in forced.stderr


def test_info_says_that_the_references_run(uncompiled: Path) -> None:
    done = python("from quaver.cli import main; import sys; sys.argv = ['quaver', 'info']; main()", uncompiled)
    assert done.returncode == 0, done.stderr
    assert "C++ kernels" in done.stdout
    assert "none, the eager references run instead: the library is not built" in done.stdout


def test_a_library_that_does_not_load_is_named_with_the_real_reason(uncompiled: Path) -> None:
    folder = uncompiled / "quaver/kernels/_lib"
    folder.mkdir()
    (folder / "libquaver_cpu.so").write_bytes(b"not a library")
    try:
        done = python("from quaver.cli import main; import sys; sys.argv = ['quaver', 'info']; main()", uncompiled)
    finally:
        (folder / "libquaver_cpu.so").unlink()
        folder.rmdir()
    assert done.returncode == 0, done.stderr
    assert "does not load" in done.stdout
    assert "file too short" in done.stdout or "invalid ELF header" in done.stdout
