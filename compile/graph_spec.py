"""What a region's graph may hold, verified after tracing and after every pass (floor 4)."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from toka.compile.region_graph import RegionGraph
from toka.errors import InvariantError

LEGAL_NAMESPACES = ("aten", "prim", "prims", "toka", "toka_cpp", "toka_triton")

# These wait for the device and hand a number to Python: legal nowhere in a step.
HOST_SYNCS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)


def verify(graph: RegionGraph, after: str) -> None:
    """Raise InvariantError, naming region and pass, if the graph breaks a rule.

    Rules: only operators of the legal namespaces (and Python's arithmetic on sizes); no host synchronisation; every tensor comes in as
    an explicit input (no parameter or large constant hidden in the graph), one placeholder for each recipe and input; every node
    has its fake value; every source of a parameter has placements, and sources that are joined have the same.
    """
    for node in graph.module.graph.nodes:
        if complaint := _complaint(node):
            raise InvariantError(f"region {graph.name} after {after}: node {node.name}: {complaint}")
    if complaint := _complaint_of_parameters(graph):
        raise InvariantError(f"region {graph.name} after {after}: {complaint}")
    graph.module.graph.lint()


def _complaint(node: Node) -> str | None:
    if node.op == "get_attr":
        return "reads a tensor that is not an input"
    if node.op == "output":
        return None
    if "val" not in node.meta:
        return "has no fake value"
    if node.op == "placeholder":
        return None
    if node.op != "call_function":
        return f"has the illegal kind {node.op}"
    if node.target in HOST_SYNCS:
        return f"{node.target} makes the host wait for the device"
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in LEGAL_NAMESPACES:
            return f"operator {node.target} is of no legal namespace"
        return None
    module = getattr(node.target, "__module__", None)
    if node.target is operator.getitem or module in (
        "_operator",
        "math",
        "torch",
        "torch.fx.experimental.symbolic_shapes",
    ):
        return None
    return f"calls {node.target}, which is no operator"


def _complaint_of_parameters(graph: RegionGraph) -> str | None:
    if len(graph.placeholders) != len(graph.recipes) + len(graph.inputs):
        return "the number of placeholders is not that of parameters and inputs"
    for recipe in graph.recipes:
        if missing := [source for source in recipe.sources if source not in graph.placements]:
            return f"parameter {missing[0]} has no placements"
        first = graph.placements[recipe.sources[0]]
        if any(graph.placements[source] != first for source in recipe.sources):
            return f"parameters of different placements are joined: {', '.join(recipe.sources)}"
    return None
