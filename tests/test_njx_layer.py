"""NJXAttention, the layer, and NJXCache, the same one token at a time."""

import pytest
import torch

from quaver.kernels import NJXCache, njx_attention
from quaver.pymodels.layers import NJXAttention, Noisy

EXCHANGES = ("random", "sinkhorn", "low-rank", "none")


def layer(exchange: str = "random", **arguments: object) -> NJXAttention:
    torch.manual_seed(0)
    return NJXAttention(32, 4, 2, 8, exchange=exchange, **{"causal": exchange != "sinkhorn", **arguments})


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_parameter_learns(exchange: str) -> None:
    module, x = layer(exchange), torch.randn(2, 37, 32, requires_grad=True)
    y = module(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("exchange", [name for name in EXCHANGES if name != "sinkhorn"])
@pytest.mark.parametrize("training", [False, True])
def test_the_future_changes_no_bit(exchange: str, training: bool) -> None:
    module, x = layer(exchange, exchange_fraction=0.5).train(training), torch.randn(2, 37, 32)
    with torch.no_grad():
        before = module(x)
        for at in (1, 8, 20, 36):
            x[:, at:] += 1
            after = module(x)
            assert torch.equal(after[:, :at], before[:, :at])
            assert not torch.equal(after[:, at:], before[:, at:])
            before = after


def test_sources_are_drawn_in_training_alone() -> None:
    module = layer()
    assert isinstance(module, Noisy)
    module.set_noise(7, 1, 0)
    first = module.source(400)
    module.set_noise(7, 2, 0)
    second = module.source(400)
    module.set_noise(7, 1, 5)
    assert torch.equal(module.source(400), first)
    assert not torch.equal(first, second)
    index = torch.arange(400)
    assert first[0] == 0
    assert (first[1:] >= 0).all()
    assert (first[1:] < index[1:]).all()
    # Uniform over the windows before: the mean of (w - source) / (w + 1) is 1/2, its deviation 0.29 / 20.
    assert abs(((index - first)[1:] / (index + 1)[1:]).mean() - 0.5) < 0.08
    assert module.eval().source(400) is None


def test_the_range_and_probability_of_the_jitter() -> None:
    near = layer(jitter_range=3)
    near.set_noise(1, 1, 0)
    back = torch.arange(300)[1:] - near.source(300)[1:]
    assert back.min() == 1
    assert back.max() == 3
    seldom = layer(jitter_probability=0.25)
    seldom.set_noise(1, 1, 0)
    moved = (torch.arange(4000)[2:] - seldom.source(4000)[2:] != 1).double().mean()
    assert abs(moved - 0.25) < 0.04
    assert layer(jitter_probability=0.0).source(9) is None
    free = layer(causal=False)
    assert torch.equal(free.source(50).sort().values, torch.arange(50))


def test_sinkhorn_mixes_doubly_stochastically() -> None:
    module = layer("sinkhorn", iterations=60)
    z = torch.randn(1, 4, 6, 8)
    # A matrix whose columns add up to one keeps the sum over windows, one whose rows do keeps what all windows share.
    torch.testing.assert_close(module._mixed(z).sum(2), z.sum(2), rtol=1e-4, atol=1e-4)
    same = z[:, :, :1].expand(z.shape)
    torch.testing.assert_close(module._mixed(same), same.contiguous(), rtol=1e-4, atol=1e-4)


def test_jitter_and_gradients_survive_compilation() -> None:
    module, x = layer(), torch.randn(2, 24, 32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"exchange": "all"}, "exchange: expected random, sinkhorn, low-rank or none, got 'all'"),
        ({"exchange": "sinkhorn", "causal": True}, "exchange: sinkhorn normalizes over all windows"),
        ({"jitter_probability": 2.0}, "jitter_probability: expected a number in [0, 1], got 2.0"),
        ({"jitter_range": 0}, "jitter_range: expected at least 1 or None, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        NJXAttention(32, 4, 2, 8, **arguments)  # type: ignore[arg-type]
    assert message in str(raised.value)


def test_more_windows_than_low_rank_holds() -> None:
    with pytest.raises(ValueError, match="expected at most 2 windows, max_windows, got 3"):
        layer("low-rank", max_windows=2)(torch.randn(1, 24, 32))


@pytest.mark.parametrize("fraction", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_token_at_a_time_equals_all_at_once(fraction: float, dtype: torch.dtype) -> None:
    q = torch.randn(2, 4, 37, 16, dtype=dtype)
    k, v = (torch.randn(2, 2, 37, 16, dtype=dtype) for _ in range(2))
    select, gate = torch.randn(2, 4, 37, dtype=dtype), torch.randn(4, dtype=dtype)
    expected = njx_attention(q, k, v, select, 8, gate=gate, causal=True, exchange_fraction=fraction)
    cache = NJXCache(8, exchange_fraction=fraction)
    found = [cache.append(*(x[:, :, :5] for x in (q, k, v, select)), gate)]
    found += [cache.append(*(x[:, :, t : t + 1] for x in (q, k, v, select)), gate) for t in range(5, 37)]
    assert cache.length == 37
    torch.testing.assert_close(torch.cat(found, 2), expected)


def test_a_cache_refuses_shapes_that_do_not_fit() -> None:
    q = torch.randn(1, 2, 1, 8)
    with pytest.raises(ValueError, match="expected \\[B, H, T, d\\]"):
        NJXCache(4).append(q, q, q, torch.zeros(1, 2, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        NJXCache(0)
