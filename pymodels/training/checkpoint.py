"""Checkpoints that a kill at any moment leaves loadable, and that run nothing when they are loaded.

A save writes the weights to a new file of their own, `.weights-STEP.safetensors`, then `last.pt`, the state, by
renaming a finished file over the old one. The state names its weights: that rename is the moment at which a
checkpoint is the new one. Before it the old pair is whole, after it the new one is. `last.safetensors` and
`best.safetensors` are links to weights, for use without the state; weights that neither the state nor a link needs
are removed last.
"""

import io
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import CheckpointError
from ..files import sync_folder, write_atomically

STATE = "last.pt"
FORMAT = "quaver-1"


def _weights_name(step: int) -> str:
    return f".weights-{step:09d}.safetensors"


def _link(source: Path, name: Path) -> None:
    """Make `name` another name of a file, atomically; a copy where the file system has no links."""
    part = name.with_name(f".{name.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        try:
            os.link(source, part)
        except OSError:
            shutil.copyfile(source, part)
        os.replace(part, name)
    finally:
        part.unlink(missing_ok=True)


def write(
    folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Any], facts: Mapping[str, str], *, best: bool
) -> None:
    """Save a checkpoint.

    Args:
        folder: of the run.
        weights: by name, whole.
        state: what resuming needs beside them: "step" and plain values, tensors, lists and dicts of them.
        facts: strings that the weights' file carries.
        best: whether these are the best weights so far.

    Raises:
        CheckpointError: where it cannot be written; the checkpoint before is whole then.
    """
    step = state["step"]
    name = _weights_name(step)
    try:
        # One copy of what is shared (a head that is the embedding), contiguous, on the CPU: as the format wants it.
        plain = {key: value.detach().cpu().contiguous().clone() for key, value in weights.items()}
        metadata = {**facts, "format": FORMAT, "step": str(step)}
        write_atomically(folder / name, save(plain, metadata))
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "weights": name, **state}, buffer)
        write_atomically(folder / STATE, buffer.getbuffer())
        _link(folder / name, folder / "last.safetensors")
        if best:
            _link(folder / name, folder / "best.safetensors")
        for old in folder.glob(".weights-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)
        sync_folder(folder)
    except OSError as error:
        if not (folder / STATE).exists() or read_state(folder)["step"] != step:
            (folder / name).unlink(missing_ok=True)
        kept = f"the checkpoint of step {read_state(folder)['step']} is whole" if (folder / STATE).exists() else "none"
        raise CheckpointError(f"{folder}: saving step {step} failed: {error.strerror}; before it: {kept}") from None


def clean(folder: Path) -> None:
    """Remove what saves that were killed have left, and finish a save that was killed after its decisive moment."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)
    if not (folder / STATE).exists():
        return
    name = read_state(folder)["weights"]
    for old in folder.glob(".weights-*.safetensors"):
        if old.name != name:
            old.unlink(missing_ok=True)
    if (folder / name).exists():
        _link(folder / name, folder / "last.safetensors")


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and the strings that it carries.

    Raises:
        CheckpointError: for a file that is missing, truncated, of another format or of another program.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != FORMAT:
                raise CheckpointError(f"{path}: not a checkpoint of quaver (its format is {facts.get('format')!r})")
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None


def read_state(folder: Path) -> dict[str, Any]:
    """The state of a run; "weights" in it is the name of its weights' file.

    Raises:
        CheckpointError: for a file that is missing, truncated, foreign, or holds anything but plain values and tensors:
            such a file is refused before anything in it runs.
    """
    path = folder / STATE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: truncated or not a state of quaver, nothing of it was run: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path}: not a state of quaver")
    name = state.get("weights")
    if name != _weights_name(state["step"]):
        raise CheckpointError(f"{path}: expected the weights of step {state['step']}, it names {name!r}")
    return state


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the state that a run goes on from.

    Raises:
        CheckpointError: where either cannot be read.
    """
    state = read_state(folder)
    path = folder / state["weights"]
    if not path.exists():
        # A run's folder copied without its hidden files has the same weights under their public names.
        for other in ("last.safetensors", "best.safetensors"):
            if (folder / other).exists() and read_weights(folder / other)[1].get("step") == str(state["step"]):
                path = folder / other
    weights, facts = read_weights(path)
    if facts.get("step") != str(state["step"]):
        raise CheckpointError(f"{path}: weights of step {facts.get('step')}, the state is of step {state['step']}")
    return weights, state


def load_weights(model: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Fill a model with weights.

    Raises:
        CheckpointError: naming what is missing, left over or of another shape.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    if missing or extra or shapes:
        lacking, left_over = (
            [f"lacks {name}" for name in missing],
            [f"has {name}, which the model lacks" for name in extra],
        )
        raise CheckpointError(f"{path}: weights of another model: {'; '.join([*lacking, *left_over, *shapes][:3])}")
    model.load_state_dict(dict(weights))
