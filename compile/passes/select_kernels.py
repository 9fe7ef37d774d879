"""Put in place of every `toka.*` operator the kernel that the registry chooses for the device and dtype, once and for all.

The traced graph calls each operator's plain-torch reference, so it runs anywhere; after this pass it calls, say, the C++ kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext


@dataclass(frozen=True)
class ChosenKernel:
    """op: the operator's name. overload: what the graph now calls. reason: why this one, for people."""

    op: str
    overload: OpOverload
    reason: str


# From an operator's name and its first tensor (only dtype, shape and device count) to a kernel.
KernelChooser = Callable[[str, torch.Tensor], ChosenKernel]


def run(program: ExportedProgram, context: PassContext) -> ExportedProgram:
    """Edit the program's graph in place and return it; what was chosen is added to `context.chosen`."""
    for node in program.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, OpOverload) and node.target.namespace == "toka":
            chosen = context.choose_kernel(node.target._schema.name.removeprefix("toka::"), _first_tensor(node))
            node.target = chosen.overload
            if chosen not in context.chosen:
                context.chosen.append(chosen)
    program.graph_module.recompile()
    return program


def _first_tensor(node: Node) -> torch.Tensor:
    first = node.args[0]
    assert isinstance(first, Node)
    value = first.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value
