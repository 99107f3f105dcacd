"""Times the rows of the ops' speed tables: interleaved, medians, every result checked before it is timed."""

import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import quaver.kernels
from quaver.kernels._cases import Row

# A variant is called for about this long in each round, and a round takes each variant in turn: what else the machine
# does falls on all of them alike.
_ROUND_SECONDS = 0.02
_ROUNDS = 9
_ROUNDS_QUICK = 5
# An alternative that takes this long a call is not timed more than three times.
_SLOW_SECONDS = 0.1


@dataclass(frozen=True)
class Timing:
    """Median seconds a call of each variant of a row, at one number of threads."""

    row: Row
    threads: int
    seconds: dict[str, float]

    @property
    def nanoseconds_per_element(self) -> float:
        return self.seconds["quaver"] / max(1, self.row.elements) * 1e9

    def ratios(self) -> dict[str, float]:
        """How many times as fast as each alternative quaver is."""
        ours = self.seconds["quaver"]
        return {name: theirs / ours for name, theirs in self.seconds.items() if name != "quaver"}


def op_names() -> list[str]:
    """What has a speed table: the op folders, and the GEMM that CPU kernels share."""
    folders = [module.name for module in pkgutil.iter_modules(quaver.kernels.__path__) if module.ispkg]
    return sorted([*folders, "gemm"])


def rows(op: str) -> list[Row]:
    """The rows of one op's speed table."""
    module = "quaver.kernels._gemm" if op == "gemm" else f"quaver.kernels.{op}.cases"
    found: list[Row] = importlib.import_module(module).ROWS
    return found


@contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _seconds(call: Callable[[], object], repeats: int, synchronize: Callable[[], None]) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize()
    return (time.perf_counter() - start) / repeats


def medians(
    calls: dict[str, Callable[[], object]], *, rounds: int = _ROUNDS, device: torch.device | None = None
) -> dict[str, float]:
    """Median seconds a call of each, taking turns for `rounds` rounds after a first call that is not timed.

    Args:
        calls: by name. One that takes over a tenth of a second is called in the first three rounds alone.
        device: whose work a call starts; None for the CPU.
    """
    on_gpu = device is not None and device.type == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if on_gpu else lambda: None
    repeats = {}
    for name, call in calls.items():
        call()  # compiles, allocates
        once = _seconds(call, 1, synchronize)
        repeats[name] = max(1, min(200, int(_ROUND_SECONDS / max(once, 1e-7))))
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds):
        for name, call in calls.items():
            if round_ >= 3 and min(measured[name]) > _SLOW_SECONDS:
                continue
            measured[name].append(_seconds(call, repeats[name], synchronize))
    return {name: statistics.median(times) for name, times in measured.items()}


def time_row(row: Row, threads: int, device: torch.device, *, quick: bool = False) -> Timing:
    """Check a row, then time its variants against each other.

    Raises:
        RuntimeError: when quaver's result differs from the reference.
    """
    with pinned_threads(threads), torch.no_grad():
        row.check(device)
        calls = {name: call for name, call in row.variants(device).items() if not (quick and name in row.slow)}
        return Timing(row, threads, medians(calls, rounds=_ROUNDS_QUICK if quick else _ROUNDS, device=device))
