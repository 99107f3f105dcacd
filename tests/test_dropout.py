"""dropout: the table of checks, on C++."""

import op_checks
import pytest
import torch
from op_checks import CPU, DTYPES, LEVELS
from torch.library import opcheck

import quaver
from quaver.kernels import _library
from quaver.kernels._cases import Case, values
from quaver.kernels.dropout.cases import CASES

BY_NAME = {case.name: case for case in CASES}
cases = pytest.mark.parametrize("case", CASES, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@cases
@dtypes
def test_equals_the_reference_at_every_simd_level(case: Case, dtype: torch.dtype) -> None:
    for level in LEVELS:
        with _library.capped_simd(level):
            op_checks.assert_equals_reference(case, dtype)


@cases
def test_everything_is_written(case: Case) -> None:
    expected = op_checks.run(case, torch.float32)
    with op_checks.poisoned_memory():
        assert torch.equal(op_checks.run(case, torch.float32), expected)


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "large"], ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    op_checks.assert_gradients(case, "cpp")


@cases
@dtypes
def test_gradients_to_rounding(case: Case, dtype: torch.dtype) -> None:
    op_checks.assert_gradients_equal_reference(case, dtype)


def test_the_mask_is_the_uniform_stream_and_backward_makes_it_again() -> None:
    x = values((100, 37), torch.float32, CPU).requires_grad_()
    kept = quaver.philox_uniform((100, 37), 5, stream=2) > 0.25
    out = quaver.dropout(x, 0.25, 5, stream=2)
    assert torch.equal(out != 0, kept)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    assert torch.equal(x.grad, kept / 0.75)


def test_a_part_with_its_offset_has_the_mask_of_the_whole() -> None:
    x = values((6, 5, 7), torch.float32, CPU)
    whole = quaver.dropout(x, 0.4, 9, stream=1)
    for part in (slice(0, 2), slice(2, 5), slice(5, 6)):
        assert torch.equal(quaver.dropout(x[part], 0.4, 9, stream=1, offset=part.start * 35), whole[part])


def test_rate_is_p() -> None:
    for p in (0.1, 0.5, 0.9):
        dropped = (quaver.dropout(torch.ones(2**20), p, 1) == 0).double().sum().item()
        # 5 deviations: p < 6e-7 for each.
        assert abs(dropped - p * 2**20) < 5 * (2**20 * p * (1 - p)) ** 0.5


def test_what_is_dropped_is_zero_whatever_it_was() -> None:
    x = torch.full((1000,), float("nan"))
    x[::2] = float("inf")
    kept = quaver.philox_uniform(1000, 1) > 0.5
    assert (quaver.dropout(x, 0.5, 1)[~kept] == 0).all()


def test_only_the_chosen_kernels_run() -> None:
    x = values((50,), torch.float32, CPU).requires_grad_()
    grad = values((50,), torch.float32, CPU)
    names = op_checks.dispatched(lambda: torch.autograd.grad(quaver.dropout(x, 0.5, 1), x, grad))
    op_checks.assert_only(names, "cpp")
    assert [name for name in names if name.startswith("quaver::")] == ["quaver::dropout", "quaver::dropout"]


@pytest.mark.parametrize("op", ["dropout", "dropout_triton"])
def test_opcheck(op: str) -> None:
    x = values((4, 5), torch.float64, CPU).requires_grad_()
    opcheck(getattr(torch.ops.quaver, op).default, (x, torch.tensor(3), 0.5, 1))


def test_compiles() -> None:
    op_checks.assert_compiles(BY_NAME["odd"], torch.float32, "aot_eager")
    op_checks.assert_compiles(BY_NAME["transposed"], torch.float32, "aot_eager", dynamic=True)


def test_compiles_with_inductor() -> None:
    op_checks.assert_compiles(BY_NAME["odd"], torch.float32, "inductor")


def test_transforms_take_the_reference() -> None:
    x = values((3, 50), torch.float64, CPU)
    kept = (quaver.philox_uniform(50, 1) > 0.5).double() * 2
    _, tangent = torch.func.jvp(
        lambda x: quaver.dropout(x * x, 0.5, 1), (x[0],), (torch.ones(50, dtype=torch.float64),)
    )
    torch.testing.assert_close(tangent, 2 * x[0] * kept)
    assert torch.equal(torch.vmap(lambda x: quaver.dropout(x, 0.5, 1))(x), x * kept)


BAD = [
    (lambda: quaver.dropout(1.0, 0.5, 1), TypeError, "x: expected a tensor, got float"),
    (lambda: quaver.dropout(torch.ones(3), 1.5, 1), ValueError, "p: expected a probability in [0, 1], got 1.5"),
    (lambda: quaver.dropout(torch.ones(3), "a", 1), TypeError, "p: expected a float, got str"),
    (
        lambda: quaver.dropout(torch.ones(3), float("nan"), 1),
        ValueError,
        "p: expected a probability in [0, 1], got nan",
    ),
    (
        lambda: quaver.dropout(torch.ones(3), 0.5, torch.arange(2)),
        ValueError,
        "seed: expected an int or a 0-dim tensor, got shape (2,)",
    ),
    (lambda: quaver.dropout(torch.ones(3), 0.5, 1, stream=2**32), ValueError, "stream: expected a value in [0, 2^32)"),
    (lambda: quaver.dropout(torch.ones(3), 0.5, 1, offset=-1), ValueError, "offset: expected a value in [0, 2^63)"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value).startswith(message)
