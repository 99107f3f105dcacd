"""The training loop: files, resuming to the bit, interruptions, what may change and what may not."""

import dataclasses
import io
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from rich.console import Console
from training_runs import StopAt, same, settings, text, train, weights

from quaver.pymodels import systems
from quaver.pymodels.config import TrainConfig
from quaver.pymodels.errors import CheckpointError, InputError
from quaver.pymodels.runs import load, load_config
from quaver.pymodels.training import checkpoint, loop
from quaver.pymodels.training.logs import read_metrics
from quaver.pymodels.training.module import learning_rate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A run without an interruption."""
    return train(folder, "whole")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def with_callbacks(monkeypatch: pytest.MonkeyPatch, *callbacks: pl.Callback) -> None:
    """The baseline with callbacks of a system's own."""
    system = dataclasses.replace(systems.find("baseline"), callbacks=lambda _: list(callbacks))
    monkeypatch.setattr(loop, "find", lambda _: system)


# ---- a run ----------------------------------------------------------------------------------------------------------
def test_a_run_learns_and_keeps_everything(folder: Path, whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert {"config.yaml", "tokenizer.json", "last.pt", "last.safetensors", "best.safetensors", "metrics.csv"} <= names
    assert list((whole / "tensorboard").glob("events*"))
    assert not list(whole.glob("*.part"))
    metrics = read_metrics(whole / "metrics.csv")
    losses = dict(metrics["train/loss"])
    assert list(losses) == list(range(1, 13))
    assert losses[1] == pytest.approx(math.log(256), rel=0.02)
    assert losses[12] < losses[1] - 1
    assert [step for step, _ in metrics["validation/loss"]] == [5, 10, 12]
    assert dict(metrics["validation/perplexity"])[12] == pytest.approx(math.exp(dict(metrics["validation/loss"])[12]))
    rates = dict(metrics["train/lr"])
    assert rates == {step: learning_rate(settings(folder).train, step - 1) for step in rates}
    assert load_config(whole) == settings(folder)
    assert yaml.safe_load((whole / "config.yaml").read_text())["system"] == "baseline"


def test_the_best_weights_are_those_of_the_lowest_validation(whole: Path) -> None:
    _, facts = checkpoint.read_weights(whole / "best.safetensors")
    losses = read_metrics(whole / "metrics.csv")["validation/loss"]
    step, loss = min(losses, key=lambda point: point[1])
    assert facts["step"] == str(step)
    assert float(facts["validation_loss"]) == loss
    run = load(whole, "baseline", "best")
    assert run.step == step
    assert not run.model.training


def test_the_same_run_again_has_the_same_bits(folder: Path, whole: Path) -> None:
    again = train(folder, "again")
    assert same(checkpoint.read(again), checkpoint.read(whole))
    assert not same(weights(whole), weights(train(folder, "other", "train.seed=1", "train.eval_every=0")))


def test_evaluations_and_saves_change_nothing(folder: Path, whole: Path) -> None:
    run = train(folder, "quiet", "train.eval_every=0", "train.save_every=100", "train.log_every=7")
    assert same(weights(run), weights(whole))


def test_the_rate_warms_up_and_falls_on_a_cosine() -> None:
    config = TrainConfig(steps=110, warmup=10, lr=1.0, final_lr_share=0.1)
    assert [round(learning_rate(config, step), 6) for step in (0, 4, 9, 10, 60, 109)] == [
        0.1,
        0.5,
        1,
        1,
        0.55,
        0.100222,
    ]
    assert learning_rate(dataclasses.replace(config, final_lr_share=1.0), 80) == 1


@pytest.mark.parametrize("change", ["train.accumulate=4", "train.activation_checkpointing=true", "train.compile=true"])
def test_what_changes_the_way_but_not_the_run(folder: Path, whole: Path, change: str) -> None:
    """The same mean gradient and the same noise, however a step is cut, recomputed or compiled."""
    run = train(folder, change, change)
    losses, expected = (dict(read_metrics(path / "metrics.csv")["train/loss"]) for path in (run, whole))
    assert losses == pytest.approx(expected, rel=1e-5)
    if "checkpointing" in change:
        assert same(weights(run), weights(whole))


def test_clipping_limits_the_gradient(folder: Path) -> None:
    run = train(folder, "clipped", "train.clip=1e-3", "train.optimizer=adam", "train.eval_every=0")
    free = train(folder, "free", "train.clip=0", "train.optimizer=adam", "train.eval_every=0")
    first = [dict(read_metrics(path / "metrics.csv")["train/gradient_norm"])[1] for path in (run, free)]
    assert first[0] == first[1] > 0.1  # what is logged is the norm before it
    assert not same(weights(run), weights(free))


def test_bf16_is_near_float32(folder: Path, whole: Path) -> None:
    run = train(folder, "bf16", "train.precision=bf16-mixed")
    losses, expected = (dict(read_metrics(path / "metrics.csv")["train/loss"]) for path in (run, whole))
    assert losses == pytest.approx(expected, rel=0.02)
    assert losses != expected
    assert all(value.dtype == torch.float32 for value in weights(run).values())


def test_a_terminal_has_a_bar(folder: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, markup=False)
    loop.train(settings(folder, "train.steps=6"), folder / "bar", console=console)
    assert re.search(r"loss \d\.\d{4}  [\d,]+ tokens/s", screen.getvalue())
    assert "6/6" in screen.getvalue()
    assert "validation" in screen.getvalue()


# ---- going on -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "steps, precision", [((0,), "32"), ((6,), "bf16-mixed"), ((10,), "32"), ((2, 3, 9), "32")], ids=str
)
def test_an_interrupted_run_goes_on_to_the_bit(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], precision: str
) -> None:
    more = (f"train.precision={precision}", "train.accumulate=2")
    name = f"{precision}-{'-'.join(map(str, steps))}"
    reference = folder / f"{precision}-whole"
    if not reference.exists():
        train(folder, reference.name, *more)
    for number, step in enumerate(steps):
        with_callbacks(monkeypatch, StopAt(step))
        train(folder, name, *more, resume=number > 0)
        assert checkpoint.read_state(folder / name)["step"] == step + 1
    with_callbacks(monkeypatch)
    run = train(folder, name, *more, resume=True)
    assert same(checkpoint.read(run), checkpoint.read(reference))
    found, expected = (read_metrics(path / "metrics.csv") for path in (run, reference))
    assert found["train/loss"] == expected["train/loss"]
    assert found["validation/loss"] == expected["validation/loss"]
    best = [checkpoint.read_weights(path / "best.safetensors") for path in (run, reference)]
    assert same(*best)


def test_what_was_logged_after_the_last_save_is_logged_again(
    folder: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed has logged steps that are done again."""

    class Killed(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, number: int) -> None:
            if module.step == 7:
                raise RuntimeError("killed")

    with_callbacks(monkeypatch, Killed())
    with pytest.raises(RuntimeError, match="killed"):
        train(folder, "killed")
    assert dict(read_metrics(folder / "killed" / "metrics.csv")["train/loss"]).keys() == set(range(1, 8))
    with_callbacks(monkeypatch)
    run = train(folder, "killed", resume=True)
    assert same(checkpoint.read(run), checkpoint.read(whole))
    assert read_metrics(run / "metrics.csv")["train/loss"] == read_metrics(whole / "metrics.csv")["train/loss"]


def test_callbacks_of_a_system_are_saved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counter(pl.Callback):
        count = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count, "tensor": torch.ones(2)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    first, second = Counter(), Counter()
    with_callbacks(monkeypatch, first, StopAt(4))
    train(folder, "counted")
    with_callbacks(monkeypatch, second)
    train(folder, "counted", resume=True)
    assert (first.count, second.count) == (5, 12)


def test_a_finished_run_is_left_alone_and_can_be_prolonged(folder: Path) -> None:
    run = train(folder, "long", "train.steps=4", "train.final_lr_share=1")
    before = (run / "last.safetensors").read_bytes()
    train(folder, "long", "train.steps=4", "train.final_lr_share=1", resume=True)
    assert (run / "last.safetensors").read_bytes() == before
    train(folder, "long", "train.steps=8", "train.final_lr_share=1", resume=True)
    straight = train(folder, "straight", "train.steps=8", "train.final_lr_share=1")
    assert same(weights(run), weights(straight))
    assert load_config(run).train.steps == 8


def test_a_second_signal_stops_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(pl.Callback):
        def on_before_backward(self, trainer: pl.Trainer, module: Any, loss: torch.Tensor) -> None:
            if module.step == 6:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

    with_callbacks(monkeypatch, Twice())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(folder, "twice")
    assert checkpoint.read_state(folder / "twice")["step"] == 5  # the evaluation that was the best
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class _Interrupted(io.RawIOBase):
    """A file during whose first write CTRL-C comes."""

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.written:
            signal.raise_signal(signal.SIGINT)
        self.written += bytes(data)
        return len(data)


def test_a_signal_in_the_middle_of_a_print(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    file = _Interrupted()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(file)))
    with loop._signals() as interrupted:
        Console().print("step 1")
        assert interrupted()
    assert file.written == b"step 1\n"
    assert "stopping after this step and its checkpoint; once more stops at once" in capfd.readouterr().out


def test_a_run_goes_on_where_its_text_has_moved(tmp_path: Path) -> None:
    train(tmp_path, "run", "train.steps=2", "train.final_lr_share=1")
    (tmp_path / "elsewhere").mkdir()
    moved = text(tmp_path).rename(tmp_path / "elsewhere" / "book.txt")
    run = train(tmp_path, "run", "train.steps=4", "train.final_lr_share=1", f"data.source={moved}", resume=True)
    moved.rename(tmp_path / "text.txt")
    assert same(weights(run), weights(train(tmp_path, "straight", "train.steps=4", "train.final_lr_share=1")))


@pytest.mark.parametrize("tokenizer", ["bpe", "characters"])
def test_text_is_tokenized_once(tmp_path: Path, tokenizer: str) -> None:
    """A run that goes on has its tokenizer, and finds the tokens that were made with it."""
    more = (f"data.tokenizer={tokenizer}", "model.vocab_size=300", "train.final_lr_share=1")
    train(tmp_path, "run", "train.steps=1", *more)
    made = {path.name for path in (tmp_path / "cache").glob("*.tokens")}
    train(tmp_path, "run", "train.steps=2", *more, resume=True)
    assert {path.name for path in (tmp_path / "cache").glob("*.tokens")} == made


# ---- what is wrong --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "more, message",
    [
        (("model.width=32",), r"model.width: the run was begun with 16, it cannot go on with 32"),
        (("train.seed=5",), r"train.seed: the run was begun with 0, it cannot go on with 5"),
        (("train.batch_size=8",), r"train.batch_size: the run was begun with 4"),
        (("data.text_field=body",), r"data.text_field: the run was begun with 'text'"),
    ],
)
def test_another_run_cannot_go_on_in_its_place(folder: Path, whole: Path, more: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train(folder, "whole", *more, resume=True)


def test_a_run_is_not_begun_over_another(folder: Path, whole: Path) -> None:
    with pytest.raises(InputError, match=r"whole: there is a run in this folder: --resume goes on with it"):
        train(folder, "whole")


def test_other_text_under_the_same_name(tmp_path: Path) -> None:
    run = train(tmp_path, "run", "train.steps=2")
    text(tmp_path).write_text("something else entirely, long enough to train on.\n" * 100)
    with pytest.raises(CheckpointError, match=r"run: the run was begun on other text than .*text.txt now holds"):
        train(tmp_path, "run", "train.steps=4", resume=True)
    assert checkpoint.read_state(run)["step"] == 2


def test_float16_needs_a_gpu(folder: Path) -> None:
    with pytest.raises(InputError, match=r"train.precision: 16-mixed needs a CUDA device; on a CPU expected 32"):
        train(folder, "half", "train.precision=16-mixed", "train.device=cpu")
    assert not (folder / "half").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_device_that_is_not_there(folder: Path) -> None:
    with pytest.raises(InputError, match=r"train.device: expected cpu, got cuda: torch sees no GPU"):
        train(folder, "gpu", "train.device=cuda")


def test_a_loss_that_is_not_finite_stops_the_run(folder: Path) -> None:
    message = r"step \d+: the (loss|norm of the gradient) is (nan|inf); train.lr = 1e\+30 may be too high"
    with pytest.raises(InputError, match=message):
        train(folder, "nan", "train.lr=1e30", "train.clip=0", "train.warmup=0")


def test_weights_that_are_not_finite_are_never_saved(folder: Path) -> None:
    """Also where nothing is logged at the step."""
    more = ("train.lr=1e30", "train.clip=0", "train.warmup=0", "train.log_every=100", "train.eval_every=0")
    with pytest.raises(InputError, match=r"step \d+: the (loss|norm of the gradient) is (nan|inf)"):
        train(folder, "unsaved", *more, "train.save_every=1")
    saved = checkpoint.read_state(folder / "unsaved")["step"]
    assert 1 <= saved < 12
    assert all(value.isfinite().all() for value in weights(folder / "unsaved").values())


def test_wandb_is_named_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WandbLogger", _missing)
    with pytest.raises(InputError, match=r"train.wandb: wandb is not installed: pip install wandb"):
        train(folder, "wandb", "train.wandb=true")


def _missing(**_: Any) -> Any:
    raise ModuleNotFoundError("wandb")


def test_text_shorter_than_a_row(tmp_path: Path) -> None:
    text(tmp_path).write_text("short\n")
    with pytest.raises(InputError, match=r"model.context: 16 tokens and their successors need 17 tokens"):
        train(tmp_path, "run")
    assert not (tmp_path / "run" / "config.yaml").exists()
