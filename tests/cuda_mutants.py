"""Removes each barrier, each wait for copies and each bound of the CUDA C++ in turn, and runs the emulator's tests: how
many of the mutants do they kill? (The files that are not listed have bounds in the headers of loops only.)

python tests/cuda_mutants.py [--json FILE] [--first N] [--last N]

A copy of the tree is changed and built, this one is left alone. A mutant is killed by a test that fails, by a build
that fails, or by not ending. What survives is printed with its line: it is equivalent, or a test is missing. Known to
be equivalent: the bounds of tiles in the two kernels of few_rows.cuh, which only save what a later bound masks;
part.has(i) in dot_rows_kernel, where load() has put zeros; the early return of column_sums_kernel, past whose columns
nothing is read or written; the bound of rows in Mask (attention.cuh) and those of a second
column in Projected (spectral_product.cuh), which save registers.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
#: The tests that are to kill the mutants of some files, and which of those tests.
GROUPS = {
    ("few_rows", "gemm", "linear_gradient", "moments", "noise", "reduce"): (
        ("tests/test_cuda_perturbed_linear.py", "tests/test_cuda_emulated.py"),
        "cuda_emulated or not any_order and (float32 or bfloat16) or any_order and bfloat16",
    ),
    ("spectral_product", "spectral_gradient"): (("tests/test_cuda_spectral_linear.py",), "float32 or bfloat16"),
    ("attention_tile", "attention", "attention_forward", "attention_backward", "window_summary"): (
        ("tests/test_cuda_window_attention.py",),
        "float32 or bfloat16",
    ),
}
#: What is removed, and what stands in its place.
RULES = [
    (re.compile(r"__sync(threads|warp)\(\);"), "", "barrier"),
    (re.compile(r"await_copies<[^>]*>\(\);"), "", "wait"),
    (re.compile(r"await_copies<kStages - 2>"), "await_copies<kStages - 1>", "wait"),
    # if (a >= b) break;
    (re.compile(r"if \([^;{]* >= [^;{]*\) (break|return|continue);"), "", "bound"),
    (re.compile(r"if \(!part\.has\(i\)\) continue;"), "", "bound"),
    (re.compile(r"(?<!!)part\.has\(i\)"), "true", "bound"),
    (re.compile(r"(?<!bool )\bhas_second\b(?! =)"), "true", "bound"),
    (re.compile(r"\bhas(?= &&)"), "true", "bound"),
    # a < b, one side of a condition.
    (re.compile(r"\b[\w.]+(?: [+*/] [\w.]+)* < [\w.]*(?:rows|columns|members|left|count)\b(?! ;)"), "true", "bound"),
]
SECONDS = 600


@dataclass(frozen=True)
class Mutant:
    """One change of one line."""

    file: str
    line: int
    kind: str
    before: str
    after: str


def mutants() -> Iterator[Mutant]:
    """Every place that a rule fits, outside of comments and of the headers of loops."""
    for file in (f"csrc/cuda/{name}.cuh" for names in GROUPS for name in names):
        for number, text in enumerate((ROOT / file).read_text().splitlines(), 1):
            code = text.split("//")[0]
            if re.search(r"\bfor \(", code):
                continue
            for pattern, replacement, kind in RULES:
                for match in pattern.finditer(code):
                    yield Mutant(file, number, kind, text, text[: match.start()] + replacement + text[match.end() :])


def tests(tree: Path, file: str) -> subprocess.CompletedProcess[str]:
    """The emulator's tests of what a file is part of, in a copy of the tree, up to the first that fails."""
    paths, selected = next(found for names, found in GROUPS.items() if Path(file).stem in names)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow"]
    command += [*paths, "-k", selected]
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the results to this file")] = None,
    first: Annotated[int, typer.Option(help="the first mutant to try")] = 0,
    last: Annotated[int | None, typer.Option(help="the mutant to stop before")] = None,
) -> None:
    """Try the mutants and print what became of each."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git", "build", ".gpu"))
        # A variable that a mutant no longer uses is no fault that a test finds.
        emulator = tree / "csrc" / "emulator" / "CMakeLists.txt"
        emulator.write_text(emulator.read_text().replace(" -Werror", ""))
        for names in GROUPS:
            clean = tests(tree, names[0])
            if clean.returncode != 0:
                raise SystemExit(f"the tests fail without a mutant:\n{clean.stdout[-2000:]}")
        for number, mutant in enumerate(mutants()):
            if number < first or (last is not None and number >= last):
                continue
            path = tree / mutant.file
            original = path.read_text()
            lines = original.splitlines()
            lines[mutant.line - 1] = mutant.after
            path.write_text("\n".join(lines) + "\n")
            try:
                done = tests(tree, mutant.file)
                killed = done.returncode != 0
                failed = re.findall(r"^FAILED \S+?::(\S+)", done.stdout, re.MULTILINE)
                by = failed[0] if failed else "build" if killed else ""
            except subprocess.TimeoutExpired:
                killed, by = True, f"no end within {SECONDS} s"
            path.write_text(original)
            results.append({**vars(mutant), "number": number, "killed": killed, "by": by})
            verdict = f"killed by {by}" if killed else "SURVIVED"
            typer.echo(f"{number} {mutant.kind} {mutant.file}:{mutant.line}: {mutant.after.strip()[:90]}: {verdict}")
            if json_file is not None:
                partial = json_file.with_suffix(".partial")
                partial.write_text(json.dumps(results, indent=1))
                os.replace(partial, json_file)
    typer.echo(f"{sum(result['killed'] for result in results)} of {len(results)} killed")


if __name__ == "__main__":
    typer.run(main)
