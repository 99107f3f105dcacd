"""perturbed_linear: wrong calls and what is said of them."""

from typing import Any

import pytest
import torch
from torch import Tensor

import quaver

X, W, B = torch.zeros(2, 5), torch.zeros(4, 5), torch.zeros(4)
SEEDS = torch.arange(3)


def linear(x: Any = X, weight: Any = W, bias: Any = None, **arguments: Any) -> Tensor:
    return quaver.perturbed_linear(x, weight, bias, **{"sigma": 0.1, "seed": 1, **arguments})


BAD = [
    (lambda: linear([1.0]), TypeError, "x: expected a tensor, got list"),
    (lambda: linear(X.long()), TypeError, "x: expected float64, float32, bfloat16 or float16, got torch.int64"),
    (
        lambda: linear(weight=W.long()),
        TypeError,
        "weight: expected float64, float32, bfloat16 or float16, got torch.int",
    ),
    (lambda: linear(weight=torch.zeros(5)), ValueError, "weight: expected [N, K], got shape (5,)"),
    (lambda: linear(torch.zeros(2, 6)), ValueError, "x: expected [.., 5] for a weight [4, 5], got [2, 6]"),
    (lambda: linear(torch.zeros(())), ValueError, "x: expected [.., 5] for a weight [4, 5], got []"),
    (
        lambda: linear(X.double()),
        TypeError,
        "x: expected torch.float32, bfloat16 or float16 with a weight of torch.float32, got torch.float64",
    ),
    (
        lambda: linear(X, W.half()),
        TypeError,
        "x: expected torch.float16 with a weight of torch.float16, got torch.float32",
    ),
    (lambda: linear(X.to("meta")), ValueError, "x: expected a tensor on cpu, as the weight is, got one on meta"),
    (lambda: linear(bias=torch.zeros(5)), ValueError, "bias: expected [4] for a weight [4, 5], got [5]"),
    (lambda: linear(bias=B.double()), TypeError, "bias: expected torch.float32, as the weight has, got torch.float64"),
    (lambda: linear(bias_sigma=0.1), ValueError, "bias_sigma: needs a bias, got None"),
    (lambda: linear(bias=B, bias_sigma="x"), TypeError, "bias_sigma: expected a float or a tensor, got str"),
    (
        lambda: linear(bias=B, bias_sigma=torch.zeros(5)),
        ValueError,
        "bias_sigma: expected a float or a tensor of shape (), (4,) or (1,), with or without a leading P, for a weight "
        "of shape (4,); got (5,)",
    ),
    (lambda: linear(sigma="x"), TypeError, "sigma: expected a float or a tensor, got str"),
    (
        lambda: linear(sigma=torch.zeros(5, 4)),
        ValueError,
        "sigma: expected a float or a tensor of shape (), (4, 5) or (4, 1) or (), with or without a leading P, for a "
        "weight of shape (4, 5); got (5, 4)",
    ),
    (
        lambda: linear(sigma=torch.zeros(2), seed=SEEDS),
        ValueError,
        "sigma: expected a leading dimension of 3, as seed has, got 2",
    ),
    (
        lambda: linear(bias=B, bias_sigma=torch.zeros(2, 4), seed=SEEDS),
        ValueError,
        "bias_sigma: expected a leading dimension of 3, as seed has, got 2",
    ),
    (
        lambda: linear(seed=SEEDS, shared_input=False),
        ValueError,
        "x: expected [3, .., K], an input for each member, got [2, 5]",
    ),
    (lambda: linear(shared_input=False), ValueError, "shared_input: False needs a population of seeds, got one seed"),
    (
        lambda: linear(seed=SEEDS, shared_input=1),
        TypeError,
        "shared_input: expected True, False or None, got int",
    ),
    (lambda: linear(seed=1.0), TypeError, "seed: expected an int or an int64 tensor, got float"),
    (
        lambda: linear(seed=torch.tensor(1, dtype=torch.int32)),
        TypeError,
        "seed: expected an int64 tensor, got torch.int32",
    ),
    (
        lambda: linear(seed=torch.zeros(2, 2, dtype=torch.int64)),
        ValueError,
        "seed: expected a 0-dim or [P] tensor, got",
    ),
    (lambda: linear(stream=-1), ValueError, "stream: expected a value in [0, 2^32), got -1"),
    (
        lambda: linear(distribution="uniform"),
        ValueError,
        "distribution: expected one of normal, rademacher, got 'uniform'",
    ),
    (lambda: linear(row_offset=-1), ValueError, "row_offset: expected a value in [0, 2^63), got -1"),
    (lambda: linear(column_offset=1), ValueError, "row_length: must be given with a column_offset"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[message[:50] for _, _, message in BAD])
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()  # type: ignore[operator]
    assert str(caught.value).startswith(message)


def test_bad_input_under_compile() -> None:
    compiled = torch.compile(lambda x: linear(x), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"x: expected \[.., 5\] for a weight \[4, 5\], got \[2, 6\]"):
        compiled(torch.zeros(2, 6))
