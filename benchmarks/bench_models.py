"""Training steps of the systems: forward, backward, optimizer, of 16 x 128 tokens."""

import math
from typing import Any

import pytest
import torch
from chaos import cloned_step, stepper

from quaver.pymodels.chaos import ChaosConfig, ChaosTransformer


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [128, 448])
@pytest.mark.parametrize("form", ["intensity 0", "intensity 0.3", "cloned weights"])
def bench_chaos_step(benchmark: Any, form: str, width: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = ChaosTransformer(ChaosConfig(context=128, width=width, hidden=2 * width))
    if form == "intensity 0.3":
        model.intensity = 0.3
    step = stepper(model, cloned_step(model, 0.3) if form == "cloned weights" else model, 16)
    first = step()
    assert abs(first - math.log(256)) < 0.3
    benchmark.group = f"chaos, width {width}, {threads} threads"
    benchmark(step)
