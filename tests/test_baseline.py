"""The baseline: sizes, causality, Hugging Face's Llama, masks, cache, noise, compilation."""

import importlib.util

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from quaver.pymodels import systems
from quaver.pymodels.baseline.config import BaselineConfig
from quaver.pymodels.baseline.model import Baseline
from quaver.pymodels.errors import InputError
from quaver.pymodels.layers import NoiseKeys, parameter_count

SMALL = BaselineConfig(vocab_size=97, context=40, width=48, layers=3, heads=4, kv_heads=2, hidden=72)


def model(config: BaselineConfig = SMALL, seed: int = 1) -> Baseline:
    return Baseline(config, seed)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset, parameters", [("5m", 5_131_008), ("10m", 9_896_832)])
def test_the_presets_have_their_sizes(preset: str, parameters: int) -> None:
    system = systems.find("baseline")
    assert parameter_count([system.build(system.run_config(preset).model, 0)]) == parameters


@pytest.mark.parametrize("length", [7, 40])
def test_a_token_changes_no_logits_before_it(length: int) -> None:
    net, x = model(), tokens(3, length)
    before = net(x)
    for at in range(length):
        changed = x.clone()
        changed[:, at] = (changed[:, at] + 1) % SMALL.vocab_size
        after = net(changed)
        assert torch.equal(after[:, :at], before[:, :at]), at
        assert not torch.equal(after[:, at], before[:, at])


def llama(config: BaselineConfig, net: Baseline) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_base,
            tie_word_embeddings=config.tied,
        )
    ).eval()
    names = {
        "embedding.": "model.embed_tokens.",
        "blocks.": "model.layers.",
        "norm.": "model.norm.",
        "head.": "lm_head.",
        ".attention_norm.": ".input_layernorm.",
        ".feed_forward_norm.": ".post_attention_layernorm.",
        ".feed_forward.": ".mlp.",
        ".attention.": ".self_attn.",
    }
    state = {}
    for name, value in net.state_dict().items():
        for ours, theirs in names.items():
            if ours[0] == ".":
                name = name.replace(ours, theirs)
            elif name.startswith(ours):
                name = theirs + name.removeprefix(ours)
        for part in ("q", "k", "v", "o", "gate", "up", "down"):
            name = name.replace(f".{part}.weight", f".{part}_proj.weight")
        state[name] = value
    if config.tied:
        state["lm_head.weight"] = net.embedding.weight
    other.load_state_dict(state)
    return other


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize("tied, kv_heads", [(True, 4), (False, 2), (True, 1)])
def test_logits_are_those_of_llama(tied: bool, kv_heads: int) -> None:
    config = BaselineConfig(97, 40, 48, 3, 4, kv_heads, 72, tied=tied, init_std=0.2)
    net = model(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    other, x = llama(config, net), tokens(2, 40)
    ours, theirs = net(x), other(input_ids=x).logits
    # Rounding of float32 in three layers.
    assert theirs.abs().max() > 3
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 30:] = 0
    padded = other(input_ids=x, attention_mask=mask).logits
    torch.testing.assert_close(net(x, attention_mask=mask)[mask.bool()], padded[mask.bool()], rtol=2e-5, atol=2e-5)


def test_padding_has_no_effect() -> None:
    net, x = model(), tokens(2, 12)
    mask = torch.ones(2, 20)
    mask[:, :8] = 0
    for padding in (0, 5):
        left = torch.cat((torch.full((2, 8), padding), x), dim=1)
        # Rotary positions are relative: a text moved to the right is the same to rounding.
        torch.testing.assert_close(net(left, attention_mask=mask)[:, 8:], net(x), rtol=1e-4, atol=1e-5)
    assert net(left, attention_mask=mask).isfinite().all()


def test_cached_logits_are_those_without_a_cache() -> None:
    net, x = model(), tokens(2, 30)
    expected = net(x)
    cache = net.make_cache(2)
    parts = [net(x[:, begin:end], cache=cache) for begin, end in ((0, 9), (9, 10), (10, 17), (17, 30))]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_dropout_follows_the_step_and_the_row_in_the_global_batch() -> None:
    config = BaselineConfig(97, 40, 48, 2, 4, 4, 72, dropout=0.3)
    net, x = model(config).train(), tokens(4, 10)
    keys = NoiseKeys(net, 5)
    assert len(keys.modules) == 5
    assert len({key for _, key in keys.modules}) == 5

    def run(step: int, begin: int, end: int) -> Tensor:
        keys.set(step, begin)
        return net(x[begin:end])

    whole = run(3, 0, 4)
    torch.testing.assert_close(torch.cat((run(3, 0, 1), run(3, 1, 4))), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(run(4, 0, 4), whole)
    assert not torch.allclose(model(config).eval()(x), whole)


def test_recomputed_activations_give_the_same_gradients() -> None:
    config = BaselineConfig(97, 40, 48, 2, 4, 4, 72, dropout=0.3)
    gradients = []
    for recompute in (False, True):
        net = model(config).train()
        net.recompute = recompute
        NoiseKeys(net, 5).set(3, 7)
        net(tokens(2, 20)).square().mean().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_new_step_compiles_nothing() -> None:
    net = model(BaselineConfig(97, 40, 48, 1, 4, 4, 72, dropout=0.3)).train()
    keys, counter = NoiseKeys(net, 5), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for step in range(4):
        keys.set(step, 0)
        torch.testing.assert_close(compiled(tokens(2, 20)), net(tokens(2, 20)), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_autocast_keeps_the_logits_near() -> None:
    net, x = model(), tokens(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x)
    torch.testing.assert_close(low.float(), net(x), rtol=0.05, atol=0.02)


def test_weights_follow_the_seed_and_each_path() -> None:
    one, same, other = model(seed=1).state_dict(), model(seed=1).state_dict(), model(seed=2).state_dict()
    drawn = [name for name, value in one.items() if value.dim() > 1]
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in drawn)
    assert not torch.equal(one["blocks.0.attention.q.weight"], one["blocks.1.attention.q.weight"])


BAD = [
    ({"width": 50}, "model.width: expected a multiple of 2 heads = 16, got 50"),
    ({"kv_heads": 3}, "model.kv_heads: expected a divisor of heads = 8, got 3"),
    ({"dropout": 1.0}, "model.dropout: expected a probability in [0, 1), got 1.0"),
    ({"layers": 0}, "model.layers: expected 1 or more, got 0"),
]


@pytest.mark.parametrize("wrong, message", BAD, ids=[next(iter(wrong)) for wrong, _ in BAD])
def test_a_wrong_config_says_what_is_expected(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        BaselineConfig(**wrong)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_more_tokens_than_the_context_are_an_error() -> None:
    with pytest.raises(ValueError, match="tokens: expected at most context = 40, got 41"):
        model()(tokens(1, 41))
