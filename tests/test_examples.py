"""The examples as programs: what they print, that they learn, that a run repeats to the bit, and wrong calls."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EVOLVE = ROOT / "examples/evolve.py"
SMALL = ("--steps=30", "--population=32", "--width=32", "--batch=64", "--context=2", "--learning-rate=0.03")

# Runs the program once for every list of arguments, as `python examples/evolve.py` would, for one import of torch.
MANY = """
import contextlib, io, json, runpy, sys
results, program = [], sys.argv[1]
for arguments in json.loads(sys.stdin.read()):
    sys.argv = [program, *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as end:
            code = end.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def run(*arguments: str | Path, stdin: str = "") -> str:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT / "src"), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, check=True).stdout


def losses(output: str) -> dict[str, list[float]]:
    """The rows of the first table: bits on the training and the validation text."""
    rows = re.findall(r"^(before|unigram|after)\b.*?(-?\d+\.\d{3}) +(-?\d+\.\d{3})", output, re.MULTILINE)
    return {name: [float(training), float(validation)] for name, training, validation in rows}


def noise_rows(output: str) -> list[tuple[float, float]]:
    """The rows of the second table: megabytes of memory that the steps add, and of that noise."""
    rows = re.findall(r"^noise (?:from seeds|stored) .*? ms +(\d+\.\d) MB +(\d+\.\d) MB", output, re.MULTILINE)
    return [(float(added), float(noise)) for added, noise in rows]


def exact(output: str) -> str:
    (value,) = re.findall(r"exact: (\S+) nats", output)
    return str(value)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "sentences.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return file


@pytest.fixture(scope="module")
def trained(sentences: Path) -> str:
    return run(EVOLVE, sentences, *SMALL, "--threads=2")


def test_evolve_learns(trained: str) -> None:
    table = losses(trained)
    assert list(table) == ["before", "unigram", "after"]
    # Uniform over the 28 characters, and well below what a model that ignores the context can reach.
    assert table["before"] == [4.807, 4.807]
    assert max(table["after"]) < min(table["unigram"]) - 0.5


def test_evolve_says_what_noise_takes(trained: str) -> None:
    (seeds, stored) = noise_rows(trained)
    assert seeds[1] == 0
    assert stored[1] == round(4 * 32 * (2 * 28 * 32 + 28 * 32 + 28) / 1e6, 1)


def test_evolve_repeats_to_the_bit_for_any_number_of_threads(trained: str, sentences: Path) -> None:
    again = run(EVOLVE, sentences, *SMALL, "--threads=1", "--no-baseline")
    assert "noise stored" not in again
    assert exact(again) == exact(trained)


def test_evolve_refuses_wrong_calls_and_takes_any_text(tmp_path: Path, sentences: Path) -> None:
    text, missing, folder = str(sentences), str(tmp_path / "missing.txt"), str(tmp_path)
    empty, latin, short, cyclic, one = (str(tmp_path / name) for name in ("empty", "latin", "short", "cyclic", "one"))
    Path(empty).touch()
    Path(latin).write_bytes(b"caf\xe9 au lait")
    Path(short).write_text("x" * 40)
    # 5,000 different characters of three bytes each, far more than the vocabulary.
    Path(cyclic).write_text("".join(chr(0x4E00 + i * i % 5000) for i in range(20_000)), encoding="utf-8")
    Path(one).write_text("a" * 41)
    # The parser's own words differ between its versions: only their beginnings are checked.
    wrong = {
        (missing,): f"{missing}: No such file or directory",
        (folder,): f"{folder}: Is a directory",
        (empty,): f"{empty}: the file is empty",
        (latin,): f"{latin}: not UTF-8 text (invalid continuation byte at byte 3)",
        (short,): f"{short}: 40 characters; --context 4 needs 41 or more",
        (text, "--steps=0"): "Invalid value for '--steps': ",
        (text, "--population=none"): "Invalid value for '--population': ",
        (text, "--sigma=0"): "--sigma 0.0: expected a finite number above 0",
        (text, "--sigma=nan"): "--sigma nan: expected a finite number above 0",
        (text, "--learning-rate=inf"): "--learning-rate inf: expected a finite number above 0",
        (text, "--vocabulary=1"): "Invalid value for '--vocabulary': ",
        (text, "--colour=red"): "No such option",
        (): "Missing ",
        (text, *SMALL, "--learning-rate=1e38"): "the loss is no longer finite: --learning-rate 1e+38 or --sigma 0.3",
    }
    right = [[cyclic, *SMALL, "--no-baseline", "--steps=2"], [one, "--steps=2", "--no-baseline"], ["--help"]]
    calls = [list(arguments) for arguments in wrong] + right
    results = json.loads(run("-c", MANY, EVOLVE, stdin=json.dumps(calls)))
    for (code, _, err), message in zip(results, wrong.values(), strict=False):
        assert (code, err.count("\n")) == (2, 1), err
        assert err.startswith(f"quaver: {message}"), err
    (chinese, single, usage) = results[len(wrong) :]
    assert (chinese[0], single[0], usage[0]) == (0, 0, 0), results[len(wrong) :]
    assert "vocabulary 256" in chinese[1]
    assert losses(single[1]) == {"before": [0, 0], "unigram": [0, 0], "after": [0, 0]}
    assert "--learning-rate" in usage[1]


@pytest.mark.slow
def test_evolve_learns_at_real_size(tmp_path: Path) -> None:
    """The defaults, on this repository's own Python."""
    text = tmp_path / "python.txt"
    files = sorted(file for folder in ("kernels", "tests", "src/quaver") for file in (ROOT / folder).glob("**/*.py"))
    text.write_text("".join(file.read_text(encoding="utf-8") for file in files), encoding="utf-8")
    output = run(EVOLVE, text)
    table = losses(output)
    assert table["after"][1] < table["unigram"][1] - 0.3
    (seeds, _), (stored, noise) = noise_rows(output)
    assert noise > 150
    assert stored - seeds > 0.8 * noise
