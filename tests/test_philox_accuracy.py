"""The normals against Box and Muller's formula in float64, from the same float32 u and the same 24-bit angle.

The words are chosen here, not drawn, so this calls the reference's `normals_of_words`; test_philox.py shows that the
C++ kernels give the same bits as the reference, at every SIMD level, and so have the same error.
"""

import math

import pytest
import torch
from torch import Tensor

from quaver.kernels.philox.reference import normals_of_words

BOUND = 1.5e-6
ALL = 1 << 24


def _error(top: Tensor, turn: Tensor) -> float:
    """The largest error of cosine and sine normals for u of the 24 bits `top` and angles turn 2^-24 (broadcast)."""
    # The low bytes of the words must not matter.
    cosine, sine = normals_of_words(top << 8 | 0x5A, turn << 8 | 0xC3)
    assert not cosine.isnan().any()
    assert not sine.isnan().any()
    u = ((top.double() + 0.5) * 2.0**-24).float().double()
    radius, angle = (-2 * u.log()).sqrt(), turn.double() * (2 * math.pi / ALL)
    errors = ((cosine - radius * angle.cos()).abs().max(), (sine - radius * angle.sin()).abs().max())
    return float(max(errors))


def _largest_error(tops: Tensor, turns: Tensor, chunk: int) -> float:
    """Over every pair of `tops` and `turns`, `chunk` pairs or so at a time."""
    rows = max(1, chunk // len(turns))
    return max(_error(part.unsqueeze(-1), turns) for part in tops.split(rows))


def _spread(count: int) -> Tensor:
    """Half evenly spaced and half random 24-bit numbers, 0 and 2^24 - 1 among them."""
    generator = torch.Generator().manual_seed(0)
    even = torch.linspace(0, ALL - 1, count - count // 2, dtype=torch.float64).long()
    return torch.cat((even, torch.randint(ALL, (count // 2,), generator=generator)))


def test_every_seventh_u_and_angle():
    # Angle 2^24 / 8 + 1 takes both polynomials to the end of their interval. u = 2^-25 has the largest radius.
    assert _largest_error(torch.arange(0, ALL, 7), torch.tensor([0, ALL // 8 + 1]), 1 << 20) <= BOUND
    assert max(_error(torch.tensor([[0], [5]]), part) for part in torch.arange(0, ALL, 7).split(1 << 19)) <= BOUND


def test_the_smallest_u_at_some_angles():
    turns = torch.randint(ALL, (4096, 128), generator=torch.Generator().manual_seed(1))
    assert _error(torch.arange(4096).unsqueeze(-1), turns) <= BOUND


@pytest.mark.slow
def test_every_u_at_64_angles():
    assert _largest_error(torch.arange(ALL), _spread(64), 1 << 20) <= BOUND


@pytest.mark.slow
def test_every_angle_at_64_u():
    turns = torch.arange(ALL)
    tops = torch.cat((torch.arange(8), _spread(56))).unsqueeze(-1)
    assert max(_error(tops, part) for part in turns.split(1 << 14)) <= BOUND


@pytest.mark.slow
def test_the_smallest_u_at_4096_angles():
    generator = torch.Generator().manual_seed(2)
    for tops in torch.arange(4096).split(256):
        turns = torch.randint(ALL, (256, 4096), generator=generator)
        assert _error(tops.unsqueeze(-1), turns) <= BOUND


def test_the_radicand_is_never_negative():
    """At angle 0 the cosine normal is the radius: above 0, so no NaN, for every u but 1, where it is 0."""
    radius, _ = normals_of_words(torch.arange(ALL) << 8, torch.tensor(0))
    assert float(radius[:-1].min()) > 0
    assert float(radius[-1]) == 0


def test_the_largest_normal():
    """u = 2^-25 at a quarter turn: sqrt(50 log 2)."""
    quarters = torch.arange(4) << 30
    cosine, sine = normals_of_words(torch.tensor(0), quarters)
    largest = float(torch.cat((cosine, sine)).abs().max())
    assert largest == pytest.approx(math.sqrt(50 * math.log(2)), abs=BOUND)
    assert largest < 5.8871
    # Exact quarter turns: one of the pair is 0, and the signs go round.
    assert torch.equal(cosine.sign(), torch.tensor([1.0, 0, -1, 0]))
    assert torch.equal(sine.sign(), torch.tensor([0, 1.0, 0, -1]))
