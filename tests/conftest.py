"""Without a GPU the whole session runs Triton's kernels in its interpreter, patched so that bfloat16 is right."""

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU and importlib.util.find_spec("triton") is not None:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton and quaver are imported: both read it then

    import triton_interpreter

    triton_interpreter.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()
