"""Training in processes of its own: two of them together, killed, interrupted, with more text than memory."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from training_runs import SETTINGS, command, environment, quaver, same, text, weights

from quaver.pymodels.training import checkpoint
from quaver.pymodels.training.logs import read_metrics


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    source = (f"data.source={text(folder)}", f"data.cache={folder / 'cache'}")
    return ["train", "baseline", "--preset", "tiny", "--out", str(folder / name), *SETTINGS, *source, *more]


def losses(folder: Path, name: str, metric: str = "train/loss") -> dict[int, float]:
    return dict(read_metrics(folder / name / "metrics.csv")[metric])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(tmp_path: Path, strategy: str) -> None:
    """Losses, gradient norms and weights within float32 rounding, with the noise of one process."""
    shared = ("train.steps=5", "train.batch_size=8", "model.dropout=0.3")
    both = (*shared, f"train.strategy={strategy}", "train.processes=2")
    for name, more in (("one", shared), ("two", both)):
        done = quaver(*arguments(tmp_path, name, *more), timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("step 5/5  loss ") == 1
        assert done.stdout.count(": 5 steps; validation: ") == 1
    for metric in ("train/loss", "train/gradient_norm", "validation/loss", "validation/accuracy"):
        assert losses(tmp_path, "two", metric) == pytest.approx(losses(tmp_path, "one", metric), rel=1e-5)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-3  # Adam: up to lr where a gradient is 0

    # What two processes have saved goes on in one, and the other way round.
    for name, more in (("two", shared), ("one", both)):
        done = quaver(*arguments(tmp_path, name, *more, "train.steps=7", "train.final_lr_share=0.1"), "--resume")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-4)


def test_chaos_trains_in_two_processes_as_in_one(tmp_path: Path) -> None:
    """Noise in the weights, oscillations and heads made anew are the same in all processes."""
    keys = [f"data.source={text(tmp_path)}", "train.threads=1", "train.log_every=1", "model.start=1", "model.end=3"]
    shapes = ("ddp", "model.evolution=true", "model.evolution_window=2"), ("fsdp2",)
    for strategy, *more in shapes:
        for name, processes in (("one", ()), ("two", (f"train.strategy={strategy}", "train.processes=2"))):
            out = tmp_path / f"{strategy}-{name}"
            done = quaver(
                *("train", "chaos", "--preset", "tiny", "--steps", "8", "--out", str(out), *keys, *more, *processes),
                timeout=300,
            )
            assert done.returncode == 0, done.stderr
        one, two = (losses(tmp_path, f"{strategy}-{name}") for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5)
        one, two = (weights(tmp_path / f"{strategy}-{name}") for name in ("one", "two"))
        assert one.keys() == two.keys()
        assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-3
    assert checkpoint.read_state(tmp_path / "ddp-two")["callbacks"]["Evolution"]["evolution_step"] > 0


def killed_run(folder: Path, kills: int, steps: int) -> int:
    """Runs and kills -9 until it has ended by itself; how many of the kills found it running."""
    choose = random.Random(kills)
    found = 0
    for number in range(kills + 1):
        process = subprocess.Popen(
            command(*arguments(folder, "killed", "train.save_every=1", f"train.steps={steps}"), "--resume"),
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
        )
        if number < kills:
            # Somewhere in the steps, once it has begun.
            before = step(folder)
            deadline = time.monotonic() + 120
            while process.poll() is None and step(folder) == before and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(choose.uniform(0, 0.3))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                found += 1
                process.communicate()
                weights(folder / "killed")  # a loadable checkpoint, at any moment
                checkpoint.read(folder / "killed")
                continue
        _, error = process.communicate()
        assert process.returncode == 0, error
    return found


def step(folder: Path) -> int:
    try:
        return int(checkpoint.read_state(folder / "killed")["step"])
    except checkpoint.CheckpointError:
        return 0


@pytest.mark.parametrize("kills", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_has_the_weights_of_one_that_is_not(tmp_path: Path, kills: int) -> None:
    steps = 50 * kills
    done = quaver(*arguments(tmp_path, "whole", "train.save_every=1", f"train.steps={steps}"))
    assert done.returncode == 0, done.stderr
    assert killed_run(tmp_path, kills, steps) >= kills - 1
    assert same(checkpoint.read(tmp_path / "killed"), checkpoint.read(tmp_path / "whole"))
    assert losses(tmp_path, "killed") == losses(tmp_path, "whole")
    hidden = {path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")}
    assert len(hidden) == 1


def test_ctrl_c_saves_and_stops(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(*arguments(tmp_path, "run", "train.steps=100000", "train.save_every=100000", "train.eval_every=0")),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "")
    assert "stopping after this step and its checkpoint; once more stops at once" in out
    reached = checkpoint.read_state(tmp_path / "run")["step"]
    assert f"stopped at step {reached} of 100000; --resume goes on" in out
    assert reached >= 3


@pytest.mark.slow
def test_text_larger_than_memory(tmp_path: Path) -> None:
    """2 GB of text in 1 GB of memory, Python, torch and Lightning included; pages of the mapped file do not count."""
    line = text(tmp_path).read_text()
    with (tmp_path / "text.txt").open("w") as out:
        for _ in range(2 * 10**9 // len(line)):
            out.write(line)
    more = ("train.steps=20", "train.eval_every=0", "data.validation_share=1e-4", "data.test_share=1e-4")
    limited = ["prlimit", f"--data={10**9}", *command(*arguments(tmp_path, "run", *more))]
    try:
        done = subprocess.run(limited, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(losses(tmp_path, "run")) == 20
    finally:
        # pytest keeps the folders of three sessions.
        (tmp_path / "text.txt").unlink()
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
