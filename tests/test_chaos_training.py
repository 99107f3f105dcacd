"""chaos in training: schedule, resuming, clean validation, evolution."""

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_chaos import SMALL, model, tokens
from torch.nn import functional as F
from training_runs import StopAt, same

from quaver.pymodels import systems
from quaver.pymodels.chaos.callbacks import ChaosSchedule, Evolution
from quaver.pymodels.config import nested, override
from quaver.pymodels.runs import load
from quaver.pymodels.training import checkpoint, loop
from quaver.pymodels.training.evaluate import evaluate
from quaver.pymodels.training.logs import read_metrics


# ---- training -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "step, level", [(0, 0), (1999, 0), (2000, 0), (3500, 0.15), (4999, 0.2999), (5000, 0.3), (9000, 0.3)]
)
def test_the_schedule_of_the_source(step: int, level: float) -> None:
    assert ChaosSchedule()(step) == pytest.approx(level, abs=1e-12)


def settings(folder: Path, *more: str) -> Any:
    file = folder / "text.txt"
    if not file.exists():
        file.write_text("the cat sees the dog under a green tree.\n" * 200)
    keys = (f"data.source={file}", f"data.cache={folder / 'cache'}", "train.steps=10", "train.log_every=1")
    short = ("train.threads=1", "train.eval_every=4", "train.save_every=3", "model.start=2", "model.end=6")
    return override(systems.find("chaos").run_config("tiny"), nested([*keys, *short, *more]))


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_run_follows_the_schedule_and_goes_on_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = ("model.evolution=true", "model.evolution_window=2", "model.evolution_cooldown=1")
    loop.train(settings(tmp_path, *more), tmp_path / "whole")
    levels = dict(read_metrics(tmp_path / "whole" / "metrics.csv")["train/intensity"])
    schedule = ChaosSchedule(2, 6)
    assert levels == {step: pytest.approx(schedule(step - 1), abs=1e-7) for step in range(1, 11)}

    chaos = systems.find("chaos")
    stopping = dataclasses.replace(chaos, callbacks=lambda config: [*chaos.callbacks(config), StopAt(6)])
    monkeypatch.setattr(loop, "find", lambda _: stopping)
    loop.train(settings(tmp_path, *more), tmp_path / "cut")
    assert checkpoint.read_state(tmp_path / "cut")["step"] == 7
    monkeypatch.undo()
    loop.train(settings(tmp_path, *more), tmp_path / "cut", resume=True)
    assert same(checkpoint.read(tmp_path / "cut"), checkpoint.read(tmp_path / "whole"))
    state = checkpoint.read_state(tmp_path / "whole")["callbacks"]["Evolution"]
    assert len(state["performance_history"]) == 5


def test_validation_is_without_noise(tmp_path: Path) -> None:
    """At the configuration's intensity, 0 unless it says otherwise, whatever the schedule has reached."""
    config = settings(tmp_path, "model.start=0", "model.end=1", "train.save_every=100")
    run = tmp_path / "run"
    loop.train(config, run)
    logged = read_metrics(run / "metrics.csv")["validation/loss"][-1][1]
    loaded = load(run, "chaos", "last")
    data = loop.prepared(loaded.system, config, run, loaded.tokenizer)
    found = evaluate(loaded.model, data, "validation", 8, evaluating=loaded.system.evaluating)["loss"]
    assert found == pytest.approx(logged, rel=1e-6)
    noisy = load(run, "chaos", "last", {"model": {"intensity": 0.5}})
    assert evaluate(noisy.model, data, "validation", 8, evaluating=noisy.system.evaluating)["loss"] != found


# ---- evolution ------------------------------------------------------------------------------------------------------
def evolution(**changes: Any) -> Evolution:
    return Evolution(dataclasses.replace(SMALL, evolution=True, start=0, end=0, evolution_window=1, **changes), 3)


def windows(callback: Evolution, losses: list[float], step: int = 100) -> list[int]:
    """The windows that a refactor follows."""
    fired: list[int] = []
    callback._scores = [torch.zeros(4)] * 2
    callback.refactor = lambda *_: fired.append(len(callback.performance_history)) or []  # type: ignore[method-assign]
    trainer = SimpleNamespace(optimizers=[None], world_size=1)
    for loss in losses:
        module = SimpleNamespace(
            step=step, model=None, mean_losses=lambda loss=loss: {"loss": loss},
            config=SimpleNamespace(train=SimpleNamespace(accumulate=1)),
        )  # fmt: skip
        callback.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    return fired


def test_stagnation_fires_once_and_rests() -> None:
    assert windows(evolution(), [4.0, 3.0, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5, 1.4]) == [4, 9]
    assert windows(evolution(evolution_cooldown=0), [2.0] * 6) == [2, 3, 4, 5, 6]
    assert windows(evolution(evolution_threshold=0.01), [4.0, 3.0, 2.0, 1.9, 1.8]) == []
    worse = evolution()
    worse.evolution_step = 8
    assert windows(worse, [2.0] * 9) == []


def test_nothing_fires_while_the_intensity_ramps() -> None:
    callback = evolution()
    callback.schedule = ChaosSchedule(50, 150)
    assert windows(callback, [2.0] * 3, step=100) == []
    assert windows(callback, [2.0] * 3, step=151) == []  # the window before was in the ramp
    assert windows(callback, [2.0] * 3, step=400) != []


def test_scores_are_what_a_head_gives_to_the_stream() -> None:
    net = model(0.0)
    callback = evolution()
    callback.on_train_start(SimpleNamespace(), SimpleNamespace(model=net))  # type: ignore[arg-type]
    attention: Any = net.blocks[1].attention
    with torch.no_grad():
        attention.o.weight[:, 6:12] = 0
    net(tokens(2, 12))
    assert callback._scores[1].argmin() == 1
    assert callback._scores[1][1] == 0
    heads = {}
    attention.o.register_forward_pre_hook(lambda _, inputs: heads.update(x=inputs[0].detach()))
    net(tokens(2, 12))
    part = heads["x"][..., 12:18] @ attention.o.weight[:, 12:18].T
    assert callback._scores[1][2].item() == pytest.approx(2 * part.abs().mean().item(), rel=1e-5)
    net.eval()(tokens(2, 12))
    assert callback._scores[1][2].item() == pytest.approx(2 * part.abs().mean().item(), rel=1e-5)
    callback.on_train_end(SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]
    assert not attention.q._forward_pre_hooks


def test_a_refactor_renews_a_head_and_leaves_the_rest() -> None:
    net = model(0.0)
    optimizer = torch.optim.Adam(net.parameters())
    F.cross_entropy(net(tokens(2, 12)).flatten(0, 1), tokens(24)).backward()
    optimizer.step()
    before = copy.deepcopy(net.state_dict())
    callback = evolution()
    assert callback.refactor(net, optimizer, [torch.tensor([3.0, 1, 2, 4]), torch.tensor([3.0, 4, 5, 1])]) == [1, 3]
    assert callback.evolution_step == 1
    for layer, head in enumerate((1, 3)):
        rows = slice(head * 6, head * 6 + 6)
        attention: Any = net.blocks[layer].attention
        for name in ("q", "k", "v"):
            linear = getattr(attention, name)
            old = before[f"blocks.{layer}.attention.{name}.weight"]
            kept = torch.ones(24, dtype=torch.bool)
            kept[rows] = False
            assert torch.equal(linear.weight[kept], old[kept])
            assert not torch.isclose(linear.weight[rows], old[rows]).any()
            assert linear.weight[rows].std().item() == pytest.approx(SMALL.init_std, rel=0.2)
            state = optimizer.state[linear.weight]
            assert not state["exp_avg"][rows].any()
            assert not state["exp_avg_sq"][rows].any()
            assert state["exp_avg"][kept].any()
        assert not attention.o.weight[:, rows].any()
        assert attention.o.weight[:, kept].all()
        assert not optimizer.state[attention.o.weight]["exp_avg"][:, rows].any()
    untouched = [name for name in before if "attention.o" not in name and ".q." not in name]
    untouched = [name for name in untouched if ".k." not in name and ".v." not in name]
    assert all(torch.equal(before[name], net.state_dict()[name]) for name in untouched)
    again = model(0.0)
    again.load_state_dict(before)
    assert evolution().refactor(again, torch.optim.Adam(again.parameters()), [torch.tensor([3.0, 1, 2, 4])] * 2)
    assert torch.equal(again.blocks[0].attention.q.weight, net.blocks[0].attention.q.weight)  # the same draw
