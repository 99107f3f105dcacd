"""The command line as a user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quaver.kernels import _library

ROOT = Path(__file__).parents[1]


def quaver(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1", **environment}
    return subprocess.run(
        [sys.executable, "-m", "quaver.cli", *arguments], env=env, capture_output=True, text=True, check=False
    )


def test_info_names_every_part() -> None:
    done = quaver("info")
    assert done.returncode == 0, done.stderr
    for part in ("quaver", "CPU", "C++ kernels", "GPU", "CUDA kernels", "Triton kernels", "on the reference"):
        assert f"\n{part}" in f"\n{done.stdout}"
    assert any(f"SIMD level {level}," in done.stdout for level in _library.SIMD_LEVELS)


def test_info_says_that_the_level_is_capped() -> None:
    assert "SIMD level base (QUAVER_SIMD)" in quaver("info", QUAVER_SIMD="base").stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ("bench", "--op", "nope"),
            "quaver: --op nope: expected one of dropout, gemm, perturb, perturbed_linear, philox, spectral_linear, "
            "window_attention",
        ),
        (("bench", "--plot", "/nowhere/x.png"), "quaver: --plot /nowhere/x.png: there is no such folder"),
        (("bench", "--threads", "x"), "quaver: --threads 'x': expected numbers separated by commas, such as 1,2"),
        (("bench", "--threads", "0"), "quaver: --threads '0': expected numbers of 1 or more"),
        (("bench", "--device", "tpu"), "quaver: --device tpu: expected cpu or cuda"),
        (("bench", "--match", "zebra"), "quaver: --match zebra: no row has it"),
        (("frobnicate",), "quaver: No such command 'frobnicate'."),
        (("info", "--frobnicate"), "quaver: No such option: --frobnicate"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    done = quaver(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == message + "\n"


def test_bench_writes_its_medians_and_a_plot_of_them(tmp_path: Path) -> None:
    file, plot = tmp_path / "speed.json", tmp_path / "speed.png"
    done = quaver(
        *("bench", "--quick", "--op", "dropout", "--threads", "1"), *("--json", str(file), "--plot", str(plot))
    )
    assert done.returncode == 0, done.stderr
    assert "F.dropout" in done.stdout
    content = json.loads(file.read_text())
    assert {row["row"] for row in content["rows"]} == {"dropout"}
    assert all(0 < seconds < 10 for row in content["rows"] for seconds in row["seconds"].values())
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(tmp_path.iterdir()) == [file, plot]


def test_bench_does_not_lose_a_file_it_cannot_write(tmp_path: Path) -> None:
    done = quaver(
        "bench", "--quick", "--op", "dropout", "--threads", "1", "--json", str(tmp_path / "missing" / "x.json")
    )
    assert done.returncode == 2
    assert "No such file or directory" in done.stderr


def test_a_wrong_result_is_not_timed() -> None:
    code = (
        "import torch\n"
        "from quaver import timing\n"
        "from quaver.kernels.dropout import cases\n"
        "cases.dropout = lambda x, *_: x + torch.rand(())\n"
        "timing.time_row(cases.ROWS[0], 1, torch.device('cpu'))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert "RuntimeError: dropout: the result differs from the reference" in done.stderr
