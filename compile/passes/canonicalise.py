"""Remove what computes nothing: slices that take everything, and nodes that nobody reads (exact)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch.export import ExportedProgram
from torch.fx import Node

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext


def run(program: ExportedProgram, context: PassContext) -> ExportedProgram:
    """Edit the program's graph in place and return it."""
    graph = program.graph
    for node in list(graph.nodes):
        if _takes_everything(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _takes_everything(node: Node) -> bool:
    if node.target is not torch.ops.aten.slice.Tensor or node.kwargs:
        return False
    given: list[object] = list(node.args[2:])
    start, end, step = given + [None, sys.maxsize, 1][len(given) :]
    return bool(start in (None, 0) and end == sys.maxsize and step == 1)
