"""A small two-layer graph with shared region, symbolic sizes and a custom operator."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from toka.compile.compiled_model import CompileOptions
from toka.compile.passes.select_kernels import ChosenKernel
from toka.compile.step_graph import Call, Region, StepGraph, TensorSpec

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH), requires_grad=False)

    def forward(self, x_TC: Tensor, key_cache: Tensor, value_cache: Tensor, slots_T: Tensor) -> tuple[Tensor]:
        y_TC = torch.relu(x_TC @ self.weight) + x_TC
        torch.ops.toka.write_kv(y_TC.unsqueeze(1), x_TC.unsqueeze(1), key_cache, value_cache, slots_T)
        return (y_TC,)


def block_region(module: nn.Module | None = None) -> Region:
    cache = TensorSpec(torch.float32, ("B", 1, 8, WIDTH))
    inputs = (
        ("x", TensorSpec(torch.float32, ("T", WIDTH))),
        ("key_cache", cache),
        ("value_cache", cache),
        ("slots", TensorSpec(torch.int32, ("T",))),
    )
    with torch.device("meta"):
        return Region("block", module or Block(), inputs, num_outputs=1)


@pytest.fixture
def graph() -> StepGraph:
    calls = tuple(
        Call("block", (f"weight.{layer}",), ("x", f"key.{layer}", f"value.{layer}", "slots"), ("x",))
        for layer in range(2)
    )
    return StepGraph((block_region(),), calls, ("x", "slots", "key.0", "value.0", "key.1", "value.1"), ("x",))


def reference_kernel(op: str, tensor: Tensor) -> ChosenKernel:
    return ChosenKernel(op, getattr(torch.ops.toka, op).default, "reference")


@pytest.fixture
def options(tmp_path: Path) -> CompileOptions:
    return CompileOptions(torch.device("cpu"), True, tmp_path, reference_kernel, "reference")
