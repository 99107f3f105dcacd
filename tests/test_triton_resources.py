"""Every Triton kernel, compiled ahead of time for sm_80, sm_90 and gfx942: in its budget, its noise not contracted."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import resource_budget
import torch

from quaver.kernels._resources import TARGETS, KernelReport
from quaver.kernels._triton import launch, recording
from quaver.kernels.perturb.triton_kernels import perturb, perturb_kernel

TESTS = Path(__file__).parent


def run_compiling(*arguments: str) -> Any:
    """The JSON that a Python program prints when Triton compiles: this session has Triton's interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["sm_90", pytest.param("all", marks=pytest.mark.slow)])
def reports(request: pytest.FixtureRequest) -> list[KernelReport]:
    """The report of one target, or of all."""
    targets = TARGETS if request.param == "all" else [request.param]
    records = run_compiling("-m", "quaver.kernels._resources", "--json", *(f"--target={target}" for target in targets))
    made = [KernelReport(**record | {"contracted": tuple(record["contracted"])}) for record in records]
    assert {report.target for report in made} == set(targets)
    return made


@pytest.fixture(scope="module")
def probe() -> Any:
    """What tests/compile_probe.py found."""
    return run_compiling(str(TESTS / "compile_probe.py"))


def test_every_kernel_is_within_its_budget(reports: list[KernelReport]) -> None:
    budget = resource_budget.read_budget(TESTS / "resource_budget.toml")
    if not list((TESTS.parent / "kernels/_lib").glob("*quaver_cuda*.so")):
        # Built without nvcc: there is no CUDA C++ to hold to its entries. Triton's names begin with their op.
        budget = {pattern: entry for pattern, entry in budget.items() if "." in pattern.split("(")[0]}
    found = resource_budget.violations(reports, budget)
    assert not found, "\n" + "\n".join(found)


def test_what_makes_noise_is_exact_and_not_contracted(reports: list[KernelReport]) -> None:
    makers = [
        report for report in reports if report.name.startswith("perturb.perturb_kernel") and "KIND=0" in report.name
    ]
    assert makers
    assert all(report.noise and report.square_roots and not report.contracted for report in makers)


def test_contraction_is_seen(probe: Any) -> None:
    assert [record["target"] for record in probe["fused"]] == list(TARGETS)
    for record in probe["fused"]:
        assert record["contracted"][-1].split(", ")[1].startswith("where the square roots are made of")
    for record in probe["fused"][:2]:
        assert any(line.startswith("fma.rn.f32") for line in record["contracted"])


def test_an_approximate_square_root_is_seen(probe: Any) -> None:
    assert [record["target"] for record in probe["approximate"]] == list(TARGETS)
    assert all("sqrt" in record["contracted"][0] for record in probe["approximate"])


def test_matrix_instructions_and_wide_loads_are_counted(probe: Any) -> None:
    assert [record["target"] for record in probe["matrix"]] == list(TARGETS)
    for record in probe["matrix"]:
        assert record["mma"] > 0
        assert record["loads"] == record["vector_loads"] > 0
        assert record["shared"] >= 2 * 64 * 64 * 2
        assert record["shared_accesses"] > 0
        assert record["barriers"] > 0
        assert not record["noise"]


def test_a_launch_is_compiled_as_triton_would(probe: Any) -> None:
    assert len(probe["as_triton_would"]) == 9
    assert all(probe["as_triton_would"])
    first, second = probe["bound"]["sm_90"]
    assert first["signature"]["one"] == "constexpr"  # the value 1
    assert second["signature"]["one"] == "i32"
    assert (first["signature"]["seed"], second["signature"]["seed"]) == ("i64", "i32")
    assert first["attributes"].keys() == {"source", "out", "count", "seed"}  # multiples of 16
    assert second["attributes"].keys() == {"out"}  # source starts at its second element
    assert first["options"] == {"num_warps": 2, "num_stages": 3, "enable_fp_fusion": False}
    assert second["options"]["enable_fp_fusion"] is True


def test_no_driver_is_needed_and_nothing_is_compiled_twice(probe: Any) -> None:
    assert probe["driver_untouched"]
    once, twice = probe["compilations"]
    assert once == twice > 0


def perturbed(weight: torch.Tensor) -> torch.Tensor:
    """The op's own launcher, with what the op gets from its public function."""
    return perturb(weight, torch.tensor(1.0), torch.tensor(3), 0, 0, 0, 0, weight.shape[-1])


def test_recording_runs_nothing() -> None:
    with recording() as launches:
        out = perturbed(torch.full((8, 8), float("nan")))
        with recording() as inner:
            perturbed(torch.zeros(1, 4))
    assert out.shape == (8, 8)
    assert (len(launches), len(inner)) == (1, 1)
    assert launches[0].kernel is perturb_kernel
    assert launches[0].keywords["enable_fp_fusion"] is False


def test_launch_says_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="expected a tensor among the positional arguments, got none"):
        launch(perturb_kernel, (1,), 3, GROUPS=256)
    with recording() as launches:
        perturbed(torch.zeros(1, 4))
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        launches[0].bind(TARGETS["sm_90"])


GOOD = KernelReport("op.kernel(fp32)", "sm_90", 40, 0, 0, 0, 300, 8, 2, 2, 1, 1, 0, 0, 0, True, 4, ())
LIMITS = {"registers": 40, "shared": 0, "vector_loads": 2, "vector_stores": 1, "mma": 8, "square_roots": 4}


@pytest.mark.parametrize(
    "change, line",
    [
        ({"registers": 41}, "registers 41, at most 40 allowed"),
        ({"shared": 16}, "shared 16, at most 0 allowed"),
        ({"spills": 1}, "spills 1, none allowed"),
        ({"stack": 8}, "stack 8, none allowed"),
        ({"vector_loads": 1}, "vector_loads 1, at least 2 expected"),
        ({"vector_stores": 0}, "vector_stores 0, at least 1 expected"),
        ({"mma": 0}, "mma 0, at least 8 expected"),
        ({"square_roots": 0}, "square_roots 0, at least 4 expected"),
        ({"contracted": ("fma.rn.f32 %f1",)}, "expected 0 contracted, got:"),
        ({"name": "op.other"}, "op.other on sm_90: expected one entry of the budget, got none"),
        ({"target": "sm_80"}, "op.kernel(fp32) on sm_80: expected one entry of the budget, got none"),
    ],
)
def test_each_violation_is_named(change: dict[str, Any], line: str) -> None:
    budget = {"op.kernel(*)": {"reason": "test", "sm_90": LIMITS}}
    assert resource_budget.violations([GOOD], budget) == []
    assert any(found.endswith(line) for found in resource_budget.violations([replace(GOOD, **change)], budget))


def test_an_entry_without_a_kernel_and_two_for_one_are_named() -> None:
    budget = {name: {"reason": "test", "sm_90": LIMITS} for name in ("op.kernel(*)", "op.*", "gone(*)")}
    found = resource_budget.violations([GOOD], budget)
    assert found[0].endswith("expected one entry of the budget, got ['op.kernel(*)', 'op.*']")
    assert '"gone(*)" sm_90: no such kernel' in found


def test_a_budget_needs_reasons_and_known_numbers(tmp_path: Path) -> None:
    file = tmp_path / "budget.toml"
    file.write_text('["a"]\nsm_90 = { registers = 1, shared = 0 }\n')
    with pytest.raises(ValueError, match="no reason"):
        resource_budget.read_budget(file)
    file.write_text('["a"]\nreason = "b"\nsm_90 = { registers = 1, shared = 0, regs = 2 }\n')
    with pytest.raises(ValueError, match="expected"):
        resource_budget.read_budget(file)
