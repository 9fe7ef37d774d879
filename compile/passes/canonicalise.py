"""Remove what computes nothing: no-op slices and casts, checks that tracing left, and nodes that nobody reads (exact)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from toka.compile.region_graph import RegionGraph

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext

aten = torch.ops.aten


def run(graph: RegionGraph, context: PassContext) -> RegionGraph:
    """Edit the graph in place and return it."""
    nodes = graph.module.graph
    for node in list(nodes.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            nodes.erase_node(node)
        elif _takes_everything(node) or _casts_to_the_same(node):
            node.replace_all_uses_with(node.args[0])
            nodes.erase_node(node)
    return graph.finish()


def _takes_everything(node: Node) -> bool:
    if node.target is not aten.slice.Tensor or node.kwargs:
        return False
    given: list[object] = list(node.args[2:])
    start, end, step = given + [None, sys.maxsize, 1][len(given) :]
    return bool(start in (None, 0) and end == sys.maxsize and step == 1)


def _casts_to_the_same(node: Node) -> bool:
    if node.target is not aten.to.dtype or node.kwargs or len(node.args) != 2:
        return False
    source = node.args[0]
    assert isinstance(source, Node)
    return bool(source.meta["val"].dtype == node.args[1])
