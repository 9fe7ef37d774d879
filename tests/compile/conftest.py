"""A small two-layer graph with shared region, symbolic sizes and a custom operator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import toka.kernels.ops  # noqa: F401  (registers the operators)
from toka.compile import artifact, builder
from toka.compile.artifact import Artifact
from toka.compile.passes.select_kernels import ChosenKernel
from toka.compile.step_graph import Call, Region, StepGraph, TensorSpec

WIDTH = 8
CPU = torch.device("cpu")
IDENTITY = {**artifact.environment(CPU), "model.width": str(WIDTH), "dtype": "float32"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH), requires_grad=False)

    def forward(self, x_TC: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> tuple[Tensor]:
        y_TC = torch.relu(x_TC @ self.weight) + x_TC
        torch.ops.toka.write_kv(y_TC.unsqueeze(1), x_TC.unsqueeze(1), key_cache, value_cache, slots_T)
        return (y_TC,)


def block_region() -> Region:
    cache = TensorSpec(torch.float32, ("B", 1, 8, WIDTH))
    inputs = (
        ("x", TensorSpec(torch.float32, ("T", WIDTH))),
        ("key_cache", cache),
        ("value_cache", cache),
        ("slots", TensorSpec(torch.int32, ("T",))),
    )
    with torch.device("meta"):
        return Region("block", Block(), inputs, num_outputs=1)


@pytest.fixture
def graph() -> StepGraph:
    calls = tuple(
        Call("block", (f"weight.{layer}",), ("x", f"key.{layer}", f"value.{layer}", "slots"), ("x",))
        for layer in range(2)
    )
    return StepGraph((block_region(),), calls, ("x", "slots", "key.0", "value.0", "key.1", "value.1"), ("x",))


def reference_kernel(op: str, tensor: Tensor) -> ChosenKernel:
    """The plain choice: toka's reference operators, PyTorch's own products."""
    namespace = torch.ops.aten if op in ("linear", "embedding") else torch.ops.toka
    return ChosenKernel(op, getattr(namespace, op).default, "reference")


@pytest.fixture
def build(graph: StepGraph, tmp_path: Path) -> Callable[[str], Artifact]:
    """Compile the graph into a directory of this name below tmp_path."""

    def make(name: str) -> Artifact:
        library = tmp_path / "kernels.so"
        library.write_bytes(b"stands for a kernel library")
        regions, chosen = builder.transform(graph, CPU, reference_kernel)
        builder.build_artifact(
            tmp_path / name, regions, CPU, IDENTITY, chosen, lambda: [library], {"compiler": "c++"}, max_processes=2
        )
        return artifact.open_artifact(tmp_path / name)

    return make
