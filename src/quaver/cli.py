"""The command line: `quaver info` and `quaver bench`, and with the packages of the models theirs."""

import importlib.util
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import quaver
from quaver.kernels import _backends, _library

app = typer.Typer(add_completion=False, no_args_is_help=True, help=quaver.__doc__, rich_markup_mode=None)
# Output that goes to a file or a pipe is not folded to the 80 columns that rich assumes there.
_console = Console(width=None if sys.stdout.isatty() else 132)


class UsageError(Exception):
    """A wrong call: one line, exit code 2."""


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cpu_kernels() -> str:
    if not _library.CPU.loaded:
        return f"none, the eager references run instead: the library is {_library.CPU.error}"
    facts = _library.build_info()
    built = f"{facts['compiler']}, torch {facts['torch']}, {facts['build_type']}" if facts else "unknown compiler"
    capped = " (QUAVER_SIMD)" if "QUAVER_SIMD" in os.environ else ""
    detected = facts.get("detected_simd", "unknown")
    if _library.current_simd() == "amx":
        bf16 = "multiplied in tiles (AMX)"
    else:
        bf16 = "multiplied in pairs" if _library.has_bf16() else "widened (no AVX512-BF16)"
    return f"SIMD level {_library.current_simd()}{capped}, detected {detected}; bf16 {bf16}; built by {built}"


def _cuda_kernels() -> str:
    reason = _backends.why_not("cuda", torch.device("cuda"))
    failure = _library.CUDA.path.with_name("cuda_build_error.txt")
    missing = failure.read_text() if failure.exists() else "no nvcc, or QUAVER_CUDA=0"
    built = "built" if _library.CUDA.path.exists() else f"not built ({missing})"
    if reason:
        return f"{built}; not in use: {reason}"
    return f"{built}; in use" if torch.cuda.is_available() else f"{built}; loaded, no GPU is visible"


def _gpus() -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _triton_kernels() -> str:
    reason = _backends.why_not("triton", torch.device("cuda"))
    if reason:
        return f"not in use: {reason}"
    import importlib.metadata

    return f"Triton {importlib.metadata.version('triton')}" + (
        "" if torch.cuda.is_available() else "; no GPU is visible"
    )


@app.command()
def info(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="compile every GPU kernel and report its resources")
    ] = False,
) -> None:
    """What is built, what runs, and why what does not run does not."""
    table = Table(show_header=False, box=None, pad_edge=False)
    facts = {
        "quaver": f"{quaver.__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        "CPU": f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "C++ kernels": _cpu_kernels(),
        "GPU": _gpus(),
        "CUDA kernels": _cuda_kernels(),
        "Triton kernels": _triton_kernels(),
        "on the reference": "calls under torch.func transforms (vmap, jvp, grad) and forward-mode AD",
    }
    for name, value in facts.items():
        table.add_row(name, value)
    _console.print(table, highlight=False)
    if kernels:
        _print_resources()


def _print_resources() -> None:
    from quaver.kernels._resources import resource_report

    table = Table("kernel", "target", box=None, pad_edge=False)
    columns = ("registers", "spills", "shared", "mma", "vector_loads", "vector_stores", "instructions")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for report in resource_report():
        table.add_row(report.name, report.target, *(str(getattr(report, column)) for column in columns))
    _console.print(table, highlight=False)


def _threads(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--threads {text!r}: expected numbers separated by commas, such as 1,2") from None
    if min(counts) < 1:
        raise UsageError(f"--threads {text!r}: expected numbers of 1 or more")
    return counts


def _write_json(path: Path, content: Any) -> None:
    """Write a file whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        raise UsageError(f"--json {path}: {error.strerror}") from None


def _check_plot(path: Path) -> None:
    """Before anything is timed: whether a plot can be made."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot: matplotlib is not installed: pip install matplotlib")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--plot {path}: there is no such folder")


@app.command()
def bench(
    op: Annotated[list[str] | None, typer.Option(help="op to time; all when not given; repeatable")] = None,
    match: Annotated[
        list[str] | None, typer.Option(help="only rows whose name and size contain this; repeatable, all must be there")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer rows and rounds")] = False,
    threads: Annotated[str | None, typer.Option(help="numbers of CPU threads, such as 1,2")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    json_file: Annotated[Path | None, typer.Option("--json", help="write the medians to this file")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="write a PNG of the ratios (needs matplotlib)")
    ] = None,
) -> None:
    """Time every op against what one would otherwise write; each result is checked against its reference first."""
    from quaver import timing

    names = [name for name in timing.op_names() if device == "cpu" or name != "gemm"]
    unknown = sorted(set(op or ()) - set(names))
    if unknown:
        raise UsageError(f"--op {unknown[0]}: expected one of {', '.join(names)}")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU")
    if plot_file is not None:
        _check_plot(plot_file)
    counts = [1] if device == "cuda" else _threads(threads) if threads else sorted({1, os.cpu_count() or 1})
    table = Table("op", "size", "threads", box=None, pad_edge=False)
    for column in ("time", "ns/element"):
        table.add_column(column, justify="right")
    table.add_column("times the speed of")
    timings = []
    with _console.status("checking and timing") as status:
        for name in op or names:
            for row in timing.rows(name):
                if (quick and not row.quick) or not all(text in str(row) for text in match or ()):
                    continue
                for count in counts:
                    status.update(f"{row}, {count} threads")
                    timed = timing.time_row(row, count, torch.device(device), quick=quick)
                    timings.append(timed)
                    seconds = timed.seconds["quaver"]
                    against = ", ".join(f"{ratio:.2f} {other}" for other, ratio in timed.ratios().items())
                    table.add_row(
                        row.name,
                        row.size,
                        str(count),
                        f"{seconds * 1e3:.3f} ms",
                        f"{timed.nanoseconds_per_element:.3f}",
                        against,
                    )
    if not timings:
        raise UsageError(f"--match {' '.join(match or ())}: no row has it")
    _console.print(table, highlight=False)
    _console.print("Every result above agreed with its reference before it was timed.", highlight=False)
    rows = [{"row": t.row.name, "size": t.row.size, "threads": t.threads, "seconds": t.seconds} for t in timings]
    content = {"cpu": _cpu_model(), "device": device, "torch": torch.__version__, "rows": rows}
    if json_file is not None:
        _write_json(json_file, content)
    if plot_file is not None:
        from quaver.plot import plot_ratios

        plot_ratios(content, plot_file)


def _add_models() -> None:
    """The commands of quaver.pymodels; where a package of theirs is missing they say which."""
    needed = ("yaml", "tokenizers", "filelock", "lightning", "safetensors")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        from quaver.pymodels.cli import COMMANDS

        for command in COMMANDS:
            app.command()(command)
        return

    def unavailable() -> None:
        """Needs `pip install quaver[models]`."""
        raise UsageError(f"not installed: {', '.join(missing)}: pip install 'quaver[models]'")

    loose = {"allow_extra_args": True, "ignore_unknown_options": True}
    for name in ("train", "evaluate", "generate", "plot", "verify"):
        app.command(name, context_settings=loose)(unavailable)


def run(program: typer.Typer) -> None:
    """Run a typer program; whatever is wrong with the call is one line on stderr and exit code 2."""
    try:
        code = program(standalone_mode=False)
    except Exception as error:
        from quaver.pymodels.errors import InputError

        # The parser's own errors, whose class depends on typer's version, have format_message.
        described = getattr(error, "format_message", None)
        if described is None and not isinstance(error, (UsageError, InputError)):
            raise
        message = f"quaver: {described() if described else error}"
        Console(stderr=True).print(message, highlight=False, soft_wrap=True, markup=False)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)


def main() -> None:
    """The console script."""
    _add_models()
    run(app)


if __name__ == "__main__":
    main()
