"""window_attention, window_exchange and njx_attention through torch: opcheck, torch.compile, autocast, vmap."""

from typing import Any

import pytest
import torch
from op_checks import assert_compiles
from torch import Tensor

from quaver.kernels import njx_attention, window_attention
from quaver.kernels._cases import Case
from quaver.kernels.window_attention.cases import CASES

BY_NAME = {case.name: case for case in CASES}
SOME = [
    BY_NAME[name] for name in ("ragged-causal", "shared-heads", "documents", "exchange-source", "njx-source-causal")
]


@pytest.mark.parametrize("case", SOME, ids=str)
def test_opcheck(case: Case) -> None:
    inputs = case.inputs(torch.float32, torch.device("cpu"))
    tensors = {name: inputs[name].detach().requires_grad_() for name in case.differentiable}
    seen = []

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "quaver":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Catch():
        case.function(**{**inputs, **tensors}).sum().backward()
    assert len(seen) == 2
    for op, args in seen:
        leaves = [
            x.detach().clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
        ]
        torch.library.opcheck(
            op, tuple(leaves), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
        )


@pytest.mark.parametrize("case", SOME, ids=str)
def test_compiles(case: Case) -> None:
    assert_compiles(case, torch.float32, "aot_eager")


def test_compiles_with_inductor() -> None:
    assert_compiles(BY_NAME["njx-source"], torch.float32, "inductor")


@pytest.mark.parametrize("causal", [False, True])
def test_one_compilation_serves_any_batch_and_number_of_tokens(causal: bool) -> None:
    """Both are symbols in it, whether windows come out even or not."""
    torch.compiler.reset()

    def njx(q: Tensor, k: Tensor, v: Tensor, select: Tensor, gate: Tensor) -> Tensor:
        return njx_attention(q, k, v, select, 8, gate=gate, exchange_fraction=0.5, causal=causal)

    compiled = torch.compile(njx, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in ((3, 40), (6, 37), (5, 9), (7, 129)):
            shapes = [(batch, 4, length, 16), *[(batch, 2, length, 16)] * 2, (batch, 4, length), (4,)]
            leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
            got, expected = compiled(*leaves), njx(*leaves)
            assert torch.equal(got, expected)
            found, wanted = (torch.autograd.grad(out.sum(), leaves) for out in (got, expected))
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other)


def test_under_autocast_heads_take_its_dtype() -> None:
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in range(3))
    select, gate = torch.randn(1, 2, 20), torch.randn(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = njx_attention(q, k, v, select, 8, gate=gate)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert gate.grad is not None
    assert gate.grad.dtype == torch.float32
    expected = njx_attention(*(x.bfloat16() for x in (q, k, v)), select, 8, gate=gate)
    assert torch.equal(out, expected)


def test_vmap_takes_the_reference() -> None:
    q, k, v = (torch.randn(3, 1, 2, 20, 8) for _ in range(3))
    got = torch.vmap(lambda q, k, v: window_attention(q, k, v, 8, causal=True))(q, k, v)
    for i in range(3):
        torch.testing.assert_close(got[i], window_attention(q[i], k[i], v[i], 8, causal=True))
