"""chaos: sizes, causality, gradients, noise, oscillation, schedule, evolution, creativity, perturbed_call."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn import functional as F
from training_runs import same

import quaver
from quaver.kernels import use_backend
from quaver.pymodels import tokenizers
from quaver.pymodels.chaos import (
    ChaosConfig,
    ChaosTransformer,
    evaluate_creativity,
    known_grams,
    perturbed_call,
    preset,
)
from quaver.pymodels.errors import InputError
from quaver.pymodels.generate import Sampling
from quaver.pymodels.layers import NoisyLinear, parameter_count

SMALL = ChaosConfig(vocab_size=61, context=24, width=24, layers=2, heads=4, hidden=40, init_std=0.3)


def model(intensity: float = 0.3, seed: int = 1, **changes: Any) -> ChaosTransformer:
    net = ChaosTransformer(dataclasses.replace(SMALL, **changes), seed)
    net.intensity = intensity
    return net


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ---- sizes ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, count", [("genesis", 185_858), ("genesis-256", 362_498), ("8k", 8_106)])
def test_the_presets_have_their_sizes(name: str, count: int) -> None:
    assert parameter_count([ChaosTransformer(preset(name))]) == count


def test_a_preset_that_there_is_not() -> None:
    with pytest.raises(InputError, match="preset 'genisis' of chaos: did you mean 'genesis'"):
        preset("genisis")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 5}, "model.width: expected a multiple of heads = 5, got 24"),
        ({"amplitude": 1.0}, r"model.amplitude: expected a share in \[0, 1\), got 1.0"),
        ({"peak": -0.1}, "model.peak: expected 0 or more, got -0.1"),
        ({"intensity": math.nan}, "model.intensity: expected 0 or more, got nan"),
        ({"start": 10, "end": 5}, "model.end: expected a step from start = 10 on, got 5"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **changes)


# ---- the model ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("intensity", [0.0, 0.3])
def test_a_token_changes_no_logits_before_it(intensity: float) -> None:
    net, x = model(intensity), tokens(3, 24)
    before = net(x)
    for at in range(24):
        changed = x.clone()
        changed[:, at] = (changed[:, at] + 1) % SMALL.vocab_size
        after = net(changed)
        assert torch.equal(after[:, :at], before[:, :at]), at
        assert not torch.equal(after[:, at], before[:, at])


def plain(net: ChaosTransformer, x: Tensor) -> Tensor:
    """The same model written with cloned weights: what the noise in the kernels must equal."""

    def noisy(linear: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        def one(value: Tensor, stream: int) -> Tensor:
            scale = value.detach().double().std().to(value.dtype) if value.numel() > 1 else torch.zeros(())
            from quaver.kernels.perturb import reference

            seed = linear.step_seed
            shape = (0, 0, value.shape[-1]) if value.dim() == 2 else (0, 0, value.shape[0])
            return reference.perturb(value, net.intensity * scale, seed, stream, 0, *shape)

        return one(weight, 0), None if bias is None else one(bias, 1)

    def linear(layer: Any, x: Tensor) -> Tensor:
        weight, bias = noisy(layer, layer.weight, layer.bias)
        return F.linear(x, weight, bias)

    length = x.shape[1]
    h = net.embedding(x) + net.positions.weight[:length]
    for block in net.blocks:
        a: Any = block.attention
        q, k, v = (linear(part, h).unflatten(-1, (a.heads, -1)).transpose(1, 2) for part in (a.q, a.k, a.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores * (1 + a.amplitude * torch.sin(a.phase + a.frequency))
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        y = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        h = block.attention_norm(h + linear(a.o, y))
        h = block.feed_forward_norm(h + linear(block.down, F.relu(linear(block.up, h))))
    return F.linear(net.norm(h), net.embedding.weight if net.head is None else net.head.weight)


@pytest.mark.parametrize("intensity", [0.0, 0.3])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_every_gradient_equal_the_plain_form(intensity: float, tied: bool) -> None:
    net, x = model(intensity, tied=tied), tokens(2, 24)
    for block in net.blocks:
        block.attention.phase.fill_(0.7)
    results = []
    for form in (net, lambda x: plain(net, x)):
        net.zero_grad()
        logits = form(x)
        F.cross_entropy(logits.flatten(0, 1), tokens(48, seed=1)).backward()
        results.append((logits.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}))
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=1e-4)
    for name, grad in our_grads.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, their_grads[name], rtol=2e-3, atol=2e-5, msg=name)


def test_the_gradient_of_the_frequency_is_that_of_a_difference() -> None:
    net, x, target = model(0.2).double(), tokens(2, 20), tokens(40, seed=1)

    def loss() -> Tensor:
        return F.cross_entropy(net(x).flatten(0, 1), target)

    loss().backward()
    for block in net.blocks:
        frequency = block.attention.frequency
        with torch.no_grad():
            step = 1e-5
            frequency += step
            above = loss()
            frequency -= 2 * step
            below = loss()
            frequency += step
        assert frequency.grad.item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5)
        assert abs(frequency.grad.item()) > 1e-6


def test_every_weight_has_noise_of_its_own() -> None:
    net = model(1.0)
    layers = [m for m in net.modules() if isinstance(m, NoisyLinear)]
    assert len(layers) == 12
    assert len({int(layer.seed) for layer in layers}) == 12
    x = tokens(1, 5)
    silent = net(x)
    with net.at(0.0):
        assert not torch.equal(net(x), silent)
        clean = net(x)
    # Noise in one layer alone changes the logits: each is perturbed.
    for layer in layers:
        net.intensity = 0.0
        layer.intensity = 0.5
        assert not torch.equal(net(x), clean)
    net.intensity = 0.0
    assert torch.equal(net(x), clean)


def test_intensity_is_read_and_set() -> None:
    net = model(0.25)
    assert net.intensity == 0.25
    net.intensity = 0.5
    assert {m.intensity for m in net.modules() if isinstance(m, NoisyLinear)} == {0.5}
    with net.at(0.1):
        assert net.intensity == 0.1
    assert net.intensity == 0.5
    with net.at(None):
        assert net.intensity == 0.5
    with pytest.raises(RuntimeError), net.at(0.9):
        raise RuntimeError
    assert net.intensity == 0.5
    assert ChaosTransformer(dataclasses.replace(SMALL, intensity=0.2)).intensity == 0.2


def test_steps_have_noise_of_their_own_and_come_again() -> None:
    net, x = model(0.3), tokens(1, 9)
    net.noise.set(5, 0)
    five = net(x)
    net.noise.set(6, 0)
    assert not torch.equal(net(x), five)
    net.noise.set(5, 3)  # the weights are those of all rows of a step
    assert torch.equal(net(x), five)
    assert not torch.equal(model(0.3, seed=2)(x), model(0.3, seed=1)(x))


def test_the_same_noise_on_every_backend() -> None:
    x = tokens(1, 24)
    net = model(0.3)
    results = {}
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            results[backend] = net(x)
    torch.testing.assert_close(results["cpp"], results["reference"], rtol=1e-4, atol=1e-4)


def test_padding_is_attended_by_nothing() -> None:
    net, x = model(), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    torch.testing.assert_close(net(x, attention_mask=mask)[0, :9], net(x[:1, :9])[0], rtol=1e-5, atol=1e-5)
    changed = x.clone()
    changed[0, 9:] = 3
    assert torch.equal(net(x, attention_mask=mask)[0, :9], net(changed, attention_mask=mask)[0, :9])


def test_bf16_autocast_and_recomputation() -> None:
    net, x, target = model(0.2), tokens(2, 16), tokens(32, seed=1)
    gradients = []
    for recompute in (False, True):
        net.recompute = recompute
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        F.cross_entropy(logits.float().flatten(0, 1), target).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert same(*gradients)
    with torch.no_grad():
        assert (logits.float() - net(x)).abs().max() < 0.1 * net(x).abs().max()


def test_one_graph_for_all_steps_and_intensities() -> None:
    net, x = model(0.3), tokens(2, 16)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for step, intensity in enumerate((0.3, 0.2, 0.25)):
        net.intensity = intensity
        net.noise.set(step, 0)
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2


# ---- oscillation ----------------------------------------------------------------------------------------------------
def test_the_oscillation_moves_on_with_steps_and_is_saved() -> None:
    net, x = model(0.0), tokens(1, 12)
    attention: Any = net.blocks[0].attention
    with torch.no_grad():
        attention.frequency.fill_(2.5)
    for step in range(1, 6):
        net.advance()
        assert attention.phase.item() == pytest.approx(2.5 * step % (2 * math.pi), abs=1e-6)
    assert attention.phase.dtype == torch.float64
    before = net(x)
    net.eval()
    assert torch.equal(net(x), before)
    assert torch.equal(net(x), before)  # calls do not move it
    other = model(0.0, seed=9)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), before)


def test_the_oscillation_matters() -> None:
    """A constant added to the scores would not: a softmax does not see it."""
    net, x = model(0.0), tokens(1, 12)
    before = net(x)
    net.advance()
    assert (net(x) - before).abs().max() > 1e-3


# ---- generation and creativity --------------------------------------------------------------------------------------
def test_generation_at_another_intensity_gives_it_back() -> None:
    net = model(0.0, vocab_size=256)
    args = (tokenizers.Bytes(), ["ab"], Sampling(max_tokens=40, temperature=0))
    clean = net.generate(*args)[0].tokens
    noisy = net.generate(*args, chaos_intensity=0.8)[0].tokens
    assert net.intensity == 0
    assert len(clean) == len(noisy) == 40  # beyond the context of 24
    assert clean != noisy
    assert net.generate(*args)[0].tokens == clean
    assert net.generate(*args, chaos_intensity=0.8)[0].tokens == noisy


def test_creativity_by_hand() -> None:
    found = evaluate_creativity(["abab", "abcd"], known_grams("xabab"))
    assert found.entropy == pytest.approx(-(6 / 8 * math.log2(3 / 8) + 2 / 8 * math.log2(1 / 8)))
    assert found.diversity == found.distinct_1 == 4 / 8
    assert found.distinct_2 == 4 / 6  # ab ba ab ab bc cd
    assert found.distinct_3 == 4 / 4
    assert found.novelty == 1 / 2
    assert found.average_length == 4
    nothing = evaluate_creativity([], known_grams("abc"))
    assert set(dataclasses.asdict(nothing).values()) == {0.0}
    assert evaluate_creativity(["aaaa"], known_grams("")).entropy == 0


# ---- perturbed_call -------------------------------------------------------------------------------------------------
def test_any_module_with_noise() -> None:
    net = nn.Sequential(nn.Conv1d(3, 4, 2), nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5))
    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
    before = copy.deepcopy(net.state_dict())
    clean = net.eval()(x)
    assert torch.equal(perturbed_call(net, x, intensity=0.0, seed=3), clean)
    noisy = perturbed_call(net, x, intensity=0.3, seed=3)
    assert not torch.isclose(noisy, clean).all()
    assert torch.equal(perturbed_call(net, x, intensity=0.3, seed=3), noisy)
    assert not torch.equal(perturbed_call(net, x, intensity=0.3, seed=4), noisy)
    assert same(dict(net.state_dict()), dict(before))
    # The gradients are those of the perturbed weights: the same by a module that has them.
    written = copy.deepcopy(net)
    with torch.no_grad():
        for name, parameter in written.named_parameters():
            sigma = 0.3 * quaver.weight_scale(parameter)
            parameter.copy_(quaver.perturb(parameter, sigma, quaver.seed_for(3, name)))
    written(x).square().sum().backward()
    perturbed_call(net, x, intensity=0.3, seed=3).square().sum().backward()
    for ours, theirs in zip(net.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        assert ours.grad is not None
        assert ours.grad.abs().max() > 0


@pytest.mark.parametrize("intensity", [-0.1, math.inf, math.nan])
def test_perturbed_call_with_a_wrong_intensity(intensity: float) -> None:
    with pytest.raises(ValueError, match=r"intensity: expected a finite number of 0 or more, got"):
        perturbed_call(nn.Linear(2, 2), torch.ones(2), intensity=intensity, seed=0)
