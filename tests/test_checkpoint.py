"""Checkpoints: killed at every moment of a save, truncated, foreign, hostile, on a full disk."""

import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from training_runs import ROOT, same

from quaver.pymodels.errors import CheckpointError
from quaver.pymodels.training import checkpoint

FACTS = {"system": "baseline"}


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((50, 3), float(step)), "b": torch.arange(4) + step}


def state(step: int) -> dict[str, Any]:
    return {"step": step, "best": 1.5 / step, "optimizer": {"exp_avg": torch.full((9,), float(step))}}


def write(folder: Path, step: int, best: bool = True) -> None:
    checkpoint.write(folder, weights(step), state(step), FACTS, best=best)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, which must be whole."""
    checkpoint.clean(folder)
    found, read = checkpoint.read(folder)
    step: int = read["step"]
    assert same(found, weights(step))
    assert same(read["optimizer"], state(step)["optimizer"])
    assert same(checkpoint.read_weights(folder / "last.safetensors")[0], weights(step))
    assert {path.name for path in folder.iterdir()} <= {
        *("last.pt", "last.safetensors", "best.safetensors", f".weights-{step:09d}.safetensors")
    }
    return step


def test_a_round_trip(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert step_of(tmp_path) == 1
    write(tmp_path, 2, best=False)
    assert step_of(tmp_path) == 2
    best, facts = checkpoint.read_weights(tmp_path / "best.safetensors")
    assert same(best, weights(1))
    assert (facts["step"], facts["system"]) == ("1", "baseline")


def test_shared_and_strided_weights(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    checkpoint.write(tmp_path, {"a": base, "b": base, "c": base.t()}, {"step": 1}, FACTS, best=False)
    found, _ = checkpoint.read(tmp_path)
    assert same(found, {"a": base, "b": base, "c": base.t().contiguous()})


#: What a save asks of the system, in which it may be killed before or after.
CALLS = ("replace", "link", "fsync", "unlink")


def killed(folder: Path, calls: int, after: bool) -> bool:
    """Save step 2 in a child that is killed at the calls-th of CALLS; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            left = [calls]

            def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
                def counted(*arguments: Any, **keywords: Any) -> Any:
                    left[0] -= 1
                    due = left[0] == 0
                    if due and not after:
                        os.kill(os.getpid(), signal.SIGKILL)
                    try:
                        return function(*arguments, **keywords)
                    finally:
                        if due:
                            os.kill(os.getpid(), signal.SIGKILL)

                return counted

            for name in CALLS:
                setattr(os, name, wrap(getattr(os, name)))
            Path.unlink = wrap(Path.unlink)  # type: ignore[method-assign]
            write(folder, 2)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_moment_of_a_save(tmp_path: Path, after: bool) -> None:
    found = []
    for number in range(1, 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(folder, 1)
        was_killed = killed(folder, number, after)
        found.append(step_of(folder))
        # A run goes on from there and saves again.
        write(folder, 3)
        assert step_of(folder) == 3
        assert same(checkpoint.read_weights(folder / "best.safetensors")[0], weights(3))
        if not was_killed:
            break
    assert found[-1] == 2
    assert found == sorted(found)  # the old one up to a moment, the new one from then on
    assert 2 < found.count(1) < len(found) - 2


def test_a_kill_in_the_first_save_leaves_nothing_that_reads_as_one(tmp_path: Path) -> None:
    for number in range(1, 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        if not killed(folder, number, after=False):
            break
        if (folder / "last.pt").exists():
            assert step_of(folder) == 2
        else:
            with pytest.raises(CheckpointError, match="there is no such file"):
                checkpoint.read(folder)
    assert number > 5


@pytest.mark.parametrize("name", ["last.pt", ".weights-000000001.safetensors"])
def test_a_truncated_file(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    whole = (tmp_path / name).read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{name}: (truncated or not a state|not a whole safetensors file)"):
            checkpoint.read(tmp_path)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_payload_does_not_run(tmp_path: Path) -> None:
    write(tmp_path, 1)
    trap = tmp_path / "ran"
    hostile = {"format": checkpoint.FORMAT, "step": 1, "weights": ".weights-000000001.safetensors", "x": Payload(trap)}
    torch.save(hostile, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last.pt: truncated or not a state of quaver, nothing of it was run"):
        checkpoint.read(tmp_path)
    (tmp_path / "last.pt").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(CheckpointError, match=r"nothing of it was run"):
        checkpoint.read(tmp_path)
    (tmp_path / "last.safetensors").unlink()
    (tmp_path / "last.safetensors").write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(CheckpointError, match=r"last.safetensors: not a whole safetensors file"):
        checkpoint.read_weights(tmp_path / "last.safetensors")
    assert not trap.exists()
    pickle.loads((tmp_path / "last.safetensors").read_bytes())  # the trap does work
    assert trap.exists()


def test_foreign_files(tmp_path: Path) -> None:
    save_file(weights(1), tmp_path / "x.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"x.safetensors: not a checkpoint of quaver \(its format is 'pt'\)"):
        checkpoint.read_weights(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"y.safetensors: there is no such file"):
        checkpoint.read_weights(tmp_path / "y.safetensors")
    torch.save({"epoch": 3, "model": {}}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last.pt: not a state of quaver"):
        checkpoint.read(tmp_path)
    outside = {"format": checkpoint.FORMAT, "step": 1, "weights": "../../secret.safetensors"}
    torch.save(outside, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"expected the weights of step 1, it names '../../secret.safetensors'"):
        checkpoint.read(tmp_path)


def test_weights_of_another_step(tmp_path: Path) -> None:
    write(tmp_path, 1)
    name = tmp_path / ".weights-000000001.safetensors"
    other = tmp_path / "other"
    other.mkdir()
    write(other, 2)
    name.write_bytes((other / "last.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"weights of step 2, the state is of step 1"):
        checkpoint.read(tmp_path)


def test_a_folder_copied_without_its_hidden_files(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2, best=False)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("last.pt", "last.safetensors", "best.safetensors"):
        shutil.copy(tmp_path / name, copy / name)
    assert same(checkpoint.read(copy)[0], weights(2))


def test_weights_of_another_model(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    good = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
    checkpoint.load_weights(model, good, tmp_path)
    for bad, message in (
        ({"weight": good["weight"]}, "lacks bias"),
        ({**good, "extra": torch.zeros(1)}, "has extra, which the model lacks"),
        ({**good, "bias": torch.zeros(3)}, r"bias is \(3,\), the model's \(2,\)"),
    ):
        with pytest.raises(CheckpointError, match=f"weights of another model: {message}"):
            checkpoint.load_weights(model, bad, tmp_path)


# ---- a full disk ----------------------------------------------------------------------------------------------------
def test_a_disk_that_fills_up_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """A limit on the size of files fails writes as a full disk does, wherever the tests run."""
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for limit in (0, 100, 900, 1600):  # the weights take 832 bytes, the state 1705
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
            with pytest.raises(CheckpointError, match=r"saving step 2 failed: File too large; .* step 1 is whole"):
                write(tmp_path, 2)
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert step_of(tmp_path) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    write(tmp_path, 2)
    assert step_of(tmp_path) == 2


def test_a_small_file_system(tmp_path: Path) -> None:
    """The same on a tmpfs of 64 KiB, where one can be mounted."""
    program = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT / "src")!r}]
from pathlib import Path
import torch
from test_checkpoint import state, step_of, weights, write
from quaver.pymodels.errors import CheckpointError
from quaver.pymodels.training import checkpoint
folder = Path({str(tmp_path)!r})
write(folder, 1)
large = {{"a": torch.zeros(20000)}}
try:
    checkpoint.write(folder, large, state(2), {{}}, best=True)
except CheckpointError as error:
    print(error)
assert step_of(folder) == 1
"""
    python = shlex.join([sys.executable, "-c", program])
    mount = f"mount -t tmpfs -o size=64k tmpfs {shlex.quote(str(tmp_path))} && exec {python}"
    done = subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", mount], capture_output=True, text=True)
    if "Operation not permitted" in done.stderr or "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "saving step 2 failed: No space left on device; before it: the checkpoint of step 1 is whole" in done.stdout
