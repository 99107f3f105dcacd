"""`quaver verify`: the parameters of a model by component, and a short check that it is what a system must be."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .config import RunConfig
from .data import Batch
from .layers import NoiseKeys, parameter_count
from .systems import System


def components(model: nn.Module) -> list[tuple[str, int]]:
    """(component, parameters): what the model is made of, its blocks' parts added up; what is shared counts once."""
    parts: dict[str, list[nn.Module]] = {}
    for name, child in model.named_children():
        if name == "blocks" and isinstance(child, nn.ModuleList):
            for block in child:
                for part, module in block.named_children():
                    parts.setdefault(f"{len(child)} x {part}", []).append(module)
        else:
            parts.setdefault(name, []).append(child)
    seen: set[int] = set()
    rows = []
    for name, modules in parts.items():
        own = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) not in seen}
        seen |= own.keys()
        if own:
            rows.append((name, sum(own.values())))
    rest = sum(p.numel() for p in model.parameters() if id(p) not in seen)
    return [*rows, ("other", rest)] if rest else rows


def _example(config: RunConfig, rows: int, length: int) -> Batch:
    generator = torch.Generator().manual_seed(config.train.seed)
    tokens = torch.randint(config.model.vocab_size, (rows, length + 1), generator=generator)
    return Batch(tokens[:, :-1], tokens[:, 1:])


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def _loss(system: System, model: nn.Module, batch: Batch) -> Tensor:
    return system.loss(model, batch, 0)["loss"]


def self_check(system: System, config: RunConfig) -> Iterator[tuple[str, str]]:
    """(check, what was found), one after the other.

    Raises:
        AssertionError: naming what is wrong.
    """
    model = system.build(config.model, config.train.seed)
    length = min(config.model.context, 64)
    batch = _example(config, 4, length)
    NoiseKeys(model, config.train.seed).set(0, 0)

    loss = _loss(system, model, batch)
    uniform = math.log(config.model.vocab_size)
    _require(abs(loss.item() - uniform) < 0.25 * uniform, f"the first loss is {loss.item():.3f}, ln V is {uniform:.3f}")
    yield "the untrained model knows nothing", f"loss {loss.item():.3f}, ln V = {uniform:.3f}"

    loss.backward()
    parameters = dict(model.named_parameters())
    without = [name for name, p in parameters.items() if p.requires_grad and (p.grad is None or not p.grad.any())]
    _require(not without, f"no gradient reaches {', '.join(without)}")
    yield "a gradient reaches every parameter", f"{len(parameters)} tensors"

    model.eval()
    with torch.no_grad():
        before: Tensor = model(batch.tokens)
        at = length // 2
        changed = batch.tokens.clone()
        changed[:, at] = (changed[:, at] + 1) % config.model.vocab_size
        after = model(changed)
        _require(torch.equal(before[:, :at], after[:, :at]), "a token changes the logits before it")
        _require(not torch.equal(before[:, at:], after[:, at:]), "a token changes nothing")
        yield "causal", f"the logits before a changed token are the same bits, at {at} of {length}"
        make_cache = getattr(model, "make_cache", None)
        if make_cache is not None:
            cache = make_cache(4)
            pieces = [model(part, cache=cache) for part in batch.tokens.split([at, 1, length - at - 1], dim=1)]
            error = (torch.cat(pieces, dim=1) - before).abs().max().item()
            _require(error < 1e-3 * before.abs().max().item(), f"with a cache the logits differ by {error:.2g}")
            yield "the cache gives the same logits", f"largest difference {error:.1e}"

    copy = system.build(config.model, config.train.seed + 1).eval()
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        _require(torch.equal(copy(batch.tokens), before), "a model with the same state gives other logits")
    yield "its state is in its state_dict", f"{parameter_count([model]):,} parameters"

    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.train.lr)
    for _ in range(10):
        optimizer.zero_grad()
        last = _loss(system, model, batch)
        last.backward()
        optimizer.step()
    _require(last.item() < loss.item(), f"ten steps on one batch: loss {loss.item():.3f}, then {last.item():.3f}")
    yield "it learns a batch by heart", f"loss {loss.item():.3f}, after ten steps {last.item():.3f}"

    for name, check in system.checks.items():
        yield name, check(system.build(config.model, config.train.seed), config.train.seed)
