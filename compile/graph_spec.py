"""What a region's graph may hold, verified after tracing and after every pass (floor 4)."""

from __future__ import annotations

import operator

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from toka.errors import InvariantError

LEGAL_NAMESPACES = ("aten", "prim", "prims", "toka", "toka_cpp")

# These wait for the device and hand a number to Python: legal nowhere in a step.
HOST_SYNCS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
)


def verify(program: ExportedProgram, region: str, after: str) -> None:
    """Raise InvariantError, naming region and pass, if the graph breaks a rule.

    Rules: only operators of the legal namespaces (and Python's arithmetic on sizes), no host synchronisation, every tensor comes in as
    an explicit input (no parameter or large constant hidden in the graph).
    """
    for node in program.graph.nodes:
        if complaint := _complaint(node, program):
            raise InvariantError(f"region {region} after {after}: node {node.name}: {complaint}")
    program.graph.lint()


def _complaint(node: Node, program: ExportedProgram) -> str | None:
    if node.op == "get_attr":
        return "reads a tensor that is not an input"
    if node.op == "placeholder":
        kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
        return None if kinds.get(node.name) is InputKind.USER_INPUT else "is a tensor hidden in the graph, not an input"
    if node.op != "call_function":
        return None if node.op == "output" else f"has the illegal kind {node.op}"
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
