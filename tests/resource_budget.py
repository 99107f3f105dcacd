"""Holds kernel reports to tests/resource_budget.toml, which is written by hand."""

import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quaver.kernels._resources import KernelReport

Budget = dict[str, dict[str, Any]]

#: At most this much. Spills and stack are none (or what an entry says of spills that stay in registers): a kernel that
#: needs them needs another tile.
_MOST = ("registers", "shared")
_NONE = ("spills", "stack")
#: At least this much.
_LEAST = ("vector_loads", "vector_stores", "mma", "square_roots")


def read_budget(path: Path) -> Budget:
    """The entries of a budget file, checked: each has a reason and only known keys."""
    budget: Budget = tomllib.loads(path.read_text())
    for pattern, entry in budget.items():
        if not entry.get("reason"):
            raise ValueError(f'{path.name}: "{pattern}" has no reason')
        for target, limits in entry.items():
            known = {*_MOST, *_LEAST, "fused", *_NONE}
            if target != "reason" and not (set(_MOST) <= set(limits) <= known):
                raise ValueError(f'{path.name}: "{pattern}" {target}: expected {_MOST}, and only {sorted(known)}')
    return budget


def violations(reports: Iterable[KernelReport], budget: Budget) -> list[str]:
    """One line for each number out of budget, kernel without an entry, and entry without a kernel."""
    found: list[str] = []
    reports = list(reports)
    targets = {report.target for report in reports}
    unused = {(pattern, target) for pattern, entry in budget.items() for target in entry if target in targets}
    for report in reports:
        label = f"{report.name} on {report.target}"
        matching = [key for key, entry in budget.items() if fnmatchcase(report.name, key) and report.target in entry]
        if len(matching) != 1:
            found.append(f"{label}: expected one entry of the budget, got {matching or 'none'}")
            continue
        limits = budget[matching[0]][report.target]
        unused.discard((matching[0], report.target))
        numbers = vars(report)
        found += [
            f"{label}: {name} {numbers[name]}, none allowed" for name in _NONE if numbers[name] > limits.get(name, 0)
        ]
        for name in _MOST:
            if numbers[name] > limits[name]:
                found.append(f"{label}: {name} {numbers[name]}, at most {limits[name]} allowed")
        for name in _LEAST:
            if numbers[name] < limits.get(name, 0):
                found.append(f"{label}: {name} {numbers[name]}, at least {limits[name]} expected")
        # An exact number: a kernel of noise that also accumulates in float32 has fused multiply-adds that it may have.
        if len(report.contracted) != limits.get("fused", 0):
            found.append(f"{label}: expected {limits.get('fused', 0)} contracted, got:")
            found += [f"    {line}" for line in report.contracted]
    return found + [f'"{pattern}" {target}: no such kernel' for pattern, target in sorted(unused)]
