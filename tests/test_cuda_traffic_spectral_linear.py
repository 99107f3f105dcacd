"""What spectral_linear's CUDA kernels move, counted by the emulator: few rows read each weight and each factor once."""

from collections.abc import Callable, Iterator
from typing import Any

import emulation
import pytest
import torch
from emulation import Emulator
from test_cuda_spectral_linear import Shape

from quaver.kernels import _ops


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    library = torch.library.Library("quaver_emulated", "FRAGMENT")
    for schema in _ops.schemas:
        if schema.startswith(("spectral", "delta_linear")):
            library.define(schema)
    yield emulation.load()
    library._destroy()


@pytest.fixture
def run(emulator: Emulator) -> Callable[..., Any]:
    def call(name: str, *arguments: Any) -> Any:
        with emulator.counting():
            return emulator.run(lambda: getattr(torch.ops.quaver_emulated, name)(*arguments))

    return call


@pytest.mark.parametrize("rank", (8, 12))
def test_few_rows_read_weights_and_factors_once(emulator: Emulator, run: Callable[..., Any], rank: int) -> None:
    tensors = Shape("decode", 9, 1, 256, 64, 8, rank).inputs_of(torch.bfloat16)
    out, _ = run("spectral_linear", *tensors.values(), False, False)
    for name in ("weight", "down", "up"):
        tensor = tensors[name]
        assert tensor is not None
        assert emulator.moved(tensor) == (tensor.nbytes, 0), name
    assert emulator.moved(out) == (0, out.nbytes)


def test_few_tokens_read_delta_once(emulator: Emulator, run: Callable[..., Any]) -> None:
    tensors = Shape("decode", 3, 2, 256, 64, 8, 8).inputs_of(torch.bfloat16)
    delta = torch.randn(3, 64, 256, dtype=torch.bfloat16)
    out = run("delta_linear", tensors["x"], tensors["weight"], tensors["bias"], delta, tensors["gain"])
    assert emulator.moved(delta) == (delta.nbytes, 0)
    assert emulator.moved(out) == (0, out.nbytes)


def test_delta_is_written_once(emulator: Emulator, run: Callable[..., Any]) -> None:
    tensors = Shape("delta", 2, 3, 128, 64, 8, 12).inputs_of(torch.bfloat16)
    factors = [tensors[name] for name in ("down", "up", "coefficients", "gain")]
    out = run("spectral_delta", *factors)
    assert emulator.moved(out) == (0, out.nbytes)
