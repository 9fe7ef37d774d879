"""The operators that multiply activations with a weight, however it is stored, seen alike by the passes (floor 4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

import toka.kernels.ops  # noqa: F401  (defines torch.ops.toka)
from toka.compile.region_graph import RegionGraph


@dataclass(frozen=True)
class Product:
    """x · weightᵀ + bias as a node says it.

    operands: the tensors that store the weight, each with the out features along dim 0; None where the weight has no such tensor.
    constants: what else the operator is given.
    """

    target: OpOverload
    x: Node
    operands: tuple[Node | None, ...]
    bias: Node | None
    constants: tuple[int, ...]

    @property
    def out_features(self) -> int:
        assert self.operands[0] is not None
        return int(self.operands[0].meta["val"].shape[0])

    def insert(self, graph: RegionGraph) -> Node:
        """A node that computes it, at the graph's insertion point."""
        return graph.call(self.target, self.x, *self.operands, self.bias, *self.constants)


def product_of(node: Node) -> Product | None:
    """The product that a node computes; None if it is none."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    reader = _READERS.get(node.target)
    return None if reader is None else reader(*node.args)


def _dense(x: Any, weight: Any, bias: Any = None) -> Product:
    return Product(torch.ops.aten.linear.default, x, (weight,), bias, ())


def _quantised(x: Any, codes: Any, scales: Any, minimums: Any, bias: Any, *constants: Any) -> Product:
    return Product(torch.ops.toka.linear_quantised.default, x, (codes, scales, minimums), bias, constants)


_READERS: dict[OpOverload, Callable[..., Product]] = {
    torch.ops.aten.linear.default: _dense,
    torch.ops.toka.linear_quantised.default: _quantised,
}
