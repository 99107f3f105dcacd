"""Run by test_perturbed_linear_layer.py: a column- and a row-parallel layer in two processes, against whole ones."""

import copy
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import quaver
from quaver import PerturbedLinear


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def say(line: str) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(line + "\n")


def check_bits(mesh: DeviceMesh) -> None:
    """Products with a unit matrix show the perturbed weights of each shard: parts of the whole ones."""
    torch.manual_seed(1)
    for distribution in ("normal", "rademacher"):
        # Seven rows and nine columns: the shards differ in size.
        one = PerturbedLinear(9, 7, intensity=0.3, seed=5, stream=1, distribution=distribution)
        with torch.no_grad():
            one.bias.zero_()
            expected = quaver.perturb(
                one.weight, 0.3 * quaver.weight_scale(one.weight), 5, stream=1, distribution=distribution
            )
            unit = torch.eye(9)
            by_rows = copy.deepcopy(one)
            by_rows.weight = nn.Parameter(distribute_tensor(one.weight, mesh, [Shard(0)]))
            by_rows.bias = nn.Parameter(distribute_tensor(one.bias, mesh, [Shard(0)]))
            assert torch.equal(whole(by_rows(unit)).t(), expected)
            by_columns = copy.deepcopy(one)
            by_columns.weight = nn.Parameter(distribute_tensor(one.weight, mesh, [Shard(1)]))
            by_columns.bias = nn.Parameter(distribute_tensor(one.bias, mesh, [Replicate()]))
            assert torch.equal(whole(by_columns(unit)).t(), expected)
    say("bits equal")


def replicate(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    """A scalar sigma cannot be cut: it is whole in every process, before parallelize_module cuts the rest."""
    for parameter in ("sigma", "bias_sigma"):
        value = getattr(module, parameter, None)
        if value is not None:
            setattr(module, parameter, nn.Parameter(distribute_tensor(value, mesh, [Replicate()])))


def check_training(mesh: DeviceMesh, learnable: str | None) -> None:
    """Result and gradients of two layers: cut by rows, then by columns."""
    torch.manual_seed(0)
    arguments = {"learnable_sigma": learnable, "intensity": 0.3, "seed": 5, "dtype": torch.float64}
    one = nn.Sequential(PerturbedLinear(9, 7, stream=1, **arguments), PerturbedLinear(7, 5, stream=2, **arguments))
    both = copy.deepcopy(one)
    if learnable == "scalar":
        for layer, placement in zip(both, (Shard(0), Shard(1)), strict=True):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight, mesh, [placement]))
            placement_of_bias = Shard(0) if placement == Shard(0) else Replicate()
            layer.bias = nn.Parameter(distribute_tensor(layer.bias, mesh, [placement_of_bias]))
            distribute_module(layer, mesh, replicate)
    else:
        parallelize_module(both, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    x = torch.randn(4, 9, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = [whole(model(x)) for model, x in zip((one, both), inputs, strict=True)]
    torch.testing.assert_close(*results[::-1])
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    for (name, expected), (_, got) in zip(one.named_parameters(), both.named_parameters(), strict=True):
        torch.testing.assert_close(whole(got.grad), expected.grad, msg=lambda text, name=name: f"{name}: {text}")
    say(f"{learnable}: equal")


def check_fully_sharded(mesh: DeviceMesh) -> None:
    """FSDP2 gathers a layer's parameters before it runs: the same bits, and gradients averaged over the processes."""
    torch.manual_seed(0)
    one = nn.Sequential(PerturbedLinear(9, 7, intensity=0.3, seed=5), PerturbedLinear(7, 5, intensity=0.3, seed=6))
    both = copy.deepcopy(one)
    for layer in (*both, both):
        fully_shard(layer, mesh=mesh)
    x = torch.randn(4, 9)
    assert torch.equal(both(x), one(x))
    both(x).square().sum().backward()
    one(x).square().sum().backward()
    for expected, got in zip(one.parameters(), both.parameters(), strict=True):
        torch.testing.assert_close(whole(got.grad), expected.grad)
    say("fully sharded: equal")


def run(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    check_bits(mesh)
    for learnable in (None, "scalar", "row", "element"):
        check_training(mesh, learnable)
    check_fully_sharded(mesh)
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (f"{folder}/store",), 2)
