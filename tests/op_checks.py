"""The table of checks of docs/checks.md, written once: each tests/test_<op>.py applies them to its op's cases."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from quaver.kernels import _library, use_backend
from quaver.kernels._cases import Case

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: The instruction sets that this machine runs.
LEVELS = _library.SIMD_LEVELS[: _library.SIMD_LEVELS.index(_library.build_info()["detected_simd"]) + 1]


def run(case: Case, dtype: torch.dtype, backend: str = "cpp", device: torch.device = CPU, **changes: Any) -> Tensor:
    """The case's result on one backend."""
    with use_backend(backend):
        return case.function(**{**case.inputs(dtype, device), **changes})


def assert_equals_reference(case: Case, dtype: torch.dtype, backend: str = "cpp", device: torch.device = CPU) -> None:
    """Bit for bit where the case promises it, else to a few roundings of a result of the reference in float64."""
    got, expected = run(case, dtype, backend, device), run(case, dtype, "reference", device)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.device == expected.device
    assert got.is_contiguous()
    if case.exact:
        assert torch.equal(got, expected)
    else:
        wide = run(case, torch.float64, "reference", device) if dtype == torch.float64 else expected
        torch.testing.assert_close(
            got.double(), wide.double(), rtol=4e-6 if dtype != torch.float64 else 1e-12, atol=1e-30
        )


def at_same_inputs(case: Case, dtype: torch.dtype) -> Case:
    """The case in float64 at the inputs that it has when they are rounded to `dtype`."""

    def inputs(_: torch.dtype, device: torch.device) -> dict[str, Any]:
        return {
            key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in case.inputs(dtype, device).items()
        }

    return dataclasses.replace(case, inputs=inputs)


#: Float64 sums in another order: roundings of the largest result (the longest sum of any case has 1300 terms).
_FLOAT64_ROUNDINGS = 32


def assert_as_accurate_as_eager(
    dtype: torch.dtype, ours: list[Tensor], theirs: list[Tensor], wide: list[Tensor], what: str
) -> None:
    """The error against float64 at the same inputs is at most twice eager's, and a rounding of the largest result.

    The three are lists of the same computation for several inputs: eager's error of one alone may be small by chance,
    that of a single number above all. Eager may have been run for more of them.
    """
    assert 0 < len(ours) <= len(theirs)
    for a, b, c in zip(ours, theirs, wide, strict=False):
        assert a.shape == b.shape == c.shape
        assert a.dtype == b.dtype
    if wide[0].numel() == 0:
        return

    def error(found: list[Tensor]) -> float:
        return max((one.double() - exact).abs().max().item() for one, exact in zip(found, wide, strict=False))

    largest = max(exact.abs().max().item() for exact in wide)
    roundings = _FLOAT64_ROUNDINGS if dtype == torch.float64 else 1
    allowed = 2 * error(theirs) + torch.finfo(ours[0].dtype).eps * largest * roundings
    assert error(ours) <= allowed, f"{what}: an error of {error(ours):.3g}, allowed {allowed:.3g}"


def assert_result_as_accurate_as_eager(
    case: Case, dtype: torch.dtype, backend: str = "cpp", device: torch.device = CPU
) -> None:
    """For products: forward, on any device against the reference on the CPU."""
    got, eager = run(case, dtype, backend, device), run(case, dtype, "reference")
    assert got.is_contiguous()
    assert got.device == device
    got = got.to(CPU)
    wide = run(at_same_inputs(case, dtype), torch.float64, "reference")
    assert_as_accurate_as_eager(dtype, [got], [eager], [wide], f"{case}, result")


def assert_gradients_as_accurate_as_eager(
    case: Case,
    dtype: torch.dtype,
    backend: str = "cpp",
    draws: Iterable[int] = range(3, 9),
    device: torch.device = CPU,
) -> None:
    """For products: the gradients of all differentiable inputs, for several gradients of the output."""
    draws = tuple(draws)
    # An interpreter's draws are few. Eager's cost little.
    all_draws = draws + tuple(draw for draw in range(20, 26) if len(draws) < 6)
    got = [gradients(case, dtype, backend, draw=draw, device=device) for draw in draws]
    eager = [gradients(case, dtype, "reference", draw=draw) for draw in all_draws]
    same = at_same_inputs(case, dtype)
    wide = [gradients(same, torch.float64, "reference", dtype, draw) for draw in all_draws]
    for i, name in enumerate(case.differentiable):
        ours, theirs, exact = ([draw[i] for draw in every] for every in (got, eager, wide))
        assert_as_accurate_as_eager(dtype, ours, theirs, exact, f"{case}, {name}")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every allocation is filled with NaN: what a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def differentiable_inputs(
    case: Case, dtype: torch.dtype, device: torch.device = CPU
) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """The inputs that have gradients, as leaves, and the case's function of them."""
    inputs = case.inputs(dtype, device)
    leaves = [inputs[name].detach().clone().requires_grad_() for name in case.differentiable]

    def function(*tensors: Tensor) -> Tensor:
        return case.function(**{**inputs, **dict(zip(case.differentiable, tensors, strict=True))})

    return leaves, function


def assert_gradients(case: Case, backend: str, device: torch.device = CPU) -> None:
    """gradcheck and gradgradcheck in float64 through the backend's own kernels."""
    leaves, function = differentiable_inputs(case, torch.float64, device)
    with use_backend(backend):
        large = function(*leaves).numel() + sum(leaf.numel() for leaf in leaves) > 500
        assert gradcheck(function, leaves, fast_mode=large)
        assert gradgradcheck(function, leaves, fast_mode=True)


def gradients(
    case: Case,
    dtype: torch.dtype,
    backend: str,
    rounded: torch.dtype | None = None,
    draw: int = 3,
    device: torch.device = CPU,
) -> list[Tensor]:
    """The gradients of the case's inputs for a fixed, uneven gradient of its output, rounded to `rounded` if given."""
    leaves, function = differentiable_inputs(case, dtype, device)
    with use_backend(backend):
        out = function(*leaves)
    generator = torch.Generator().manual_seed(draw)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(rounded or out.dtype).to(out.dtype)
    # Outside use_backend: the choice was carried along.
    out.backward(weights.to(device))
    return [leaf.grad.to(CPU) for leaf in leaves if leaf.grad is not None]


def assert_gradients_equal_reference(case: Case, dtype: torch.dtype, backend: str = "cpp") -> None:
    """Gradients of float32 and 16-bit inputs agree with the float64 reference to the roundings of that dtype."""
    got, expected = gradients(case, dtype, backend), gradients(case, torch.float64, "reference")
    eager = gradients(case, dtype, "reference")
    assert len(got) == len(expected) == len(case.differentiable)
    for ours, wide, theirs in zip(got, expected, eager, strict=True):
        assert ours.shape == wide.shape
        if wide.numel() == 0:
            continue
        if dtype == torch.float64:  # the reference itself: equal but for the order of a sum
            torch.testing.assert_close(ours, wide, rtol=1e-10, atol=1e-12)
            continue
        # The inputs are rounded to dtype for both, so the eager reference at that dtype has that error too.
        allowed = 2 * (theirs.double() - wide).abs().max() + torch.finfo(ours.dtype).eps * wide.abs().max()
        assert (ours.double() - wide).abs().max() <= allowed


def dispatched(call: Callable[[], Any]) -> list[str]:
    """The names of all ops that `call` dispatches, those inside compiled kernels with them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events() if "::" in event.name]


#: What a backend's own kernel may dispatch: allocation, views, copies of layout and of dtype. Never arithmetic.
_ALLOWED_NAMES = """
    empty empty_like empty_strided new_empty contiguous clone copy_ _to_copy to view reshape expand as_strided select
    unsqueeze squeeze detach detach_ alias resolve_conj resolve_neg result_type lift_fresh item _local_scalar_dense
    is_nonzero view_as zeros zero_ fill_ full new_zeros unbind narrow slice flatten t transpose permute _reshape_alias
    _unsafe_view
"""
ALLOWED = {f"aten::{name}" for name in _ALLOWED_NAMES.split()}


def assert_only(names: list[str], backend: str, *allowed: str) -> None:
    """The ops are the backend's own and no aten arithmetic but what the op's README names."""
    ours = [name for name in names if name.startswith("quaver::")]
    assert ours, names
    for name in ours:
        assert name.endswith("_triton") == (backend == "triton"), name
    strange = {name for name in names if name.startswith("aten::")} - ALLOWED - set(allowed)
    assert not strange, strange


def assert_compiles(case: Case, dtype: torch.dtype, compiler: str, *, dynamic: bool | None = None) -> None:
    """torch.compile(fullgraph=True) of forward and backward gives the eager results."""
    leaves, function = differentiable_inputs(case, dtype)
    compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=dynamic)
    with use_backend("cpp"):
        expected, got = function(*leaves), compiled(*leaves)
        assert torch.equal(got, expected)
        if not leaves:
            return
        wanted = torch.autograd.grad(expected.sum(), leaves)
        found = torch.autograd.grad(got.sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
