"""Put in place of every `toka.*` operator and every product the kernel that the registry chooses, once and for all.

The traced graph calls each operator's plain-torch reference, so it runs anywhere; after this pass it calls, say, the C++ kernel.
A kernel that wants its weight packed gets it so: the parameter's recipe says that it is packed when weights are bound. An
embedding table is packed with it, since it often is the LM head's weight too and should be kept once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._ops import OpOverload
from torch.fx import Node

from toka.compile.region_graph import Recipe, RegionGraph

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext

aten = torch.ops.aten


@dataclass(frozen=True)
class ChosenKernel:
    """op: the operator's name. overload: what the graph now calls. reason: why this one, for people. packing: see Recipe."""

    op: str
    overload: OpOverload
    reason: str
    packing: str | None = None


# From an operator's name and its first tensor (only dtype, shape and device count) to a kernel.
KernelChooser = Callable[[str, torch.Tensor], ChosenKernel]


def run(graph: RegionGraph, context: PassContext) -> RegionGraph:
    """Edit the graph in place and return it; what was chosen is added to `context.chosen`."""
    for node in list(graph.module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        if node.target.namespace == "toka":
            node.target = _choose(node.target._schema.name.removeprefix("toka::"), node, context).overload
        elif node.target is aten.linear.default:
            _replace_linear(graph, node, _choose("linear", node, context))
        elif node.target is aten.embedding.default and graph.recipe_of(node.args[0]) is not None:
            _replace_embedding(graph, node, _choose("embedding", node, context))
    return graph.finish()


def _choose(op: str, node: Node, context: PassContext) -> ChosenKernel:
    chosen = context.choose_kernel(op, _first_tensor(node))
    if chosen not in context.chosen:
        context.chosen.append(chosen)
    return chosen


def _replace_linear(graph: RegionGraph, node: Node, chosen: ChosenKernel) -> None:
    x, weight, *rest = node.args
    bias = rest[0] if rest else None
    if chosen.overload is aten.linear.default:
        return
    assert isinstance(weight, Node)
    arguments: tuple[object, ...] = (x, weight, bias)
    if chosen.packing is not None:
        arguments = (x, _packed(graph, weight, chosen.packing), bias, weight.meta["val"].shape[0])
    with graph.module.graph.inserting_before(node):
        node.replace_all_uses_with(graph.call(chosen.overload, *arguments))
    graph.module.graph.erase_node(node)


def _replace_embedding(graph: RegionGraph, node: Node, chosen: ChosenKernel) -> None:
    table, ids = node.args[:2]
    if chosen.packing is None:
        return
    assert isinstance(table, Node)
    panels = _packed(graph, table, chosen.packing)
    with graph.module.graph.inserting_before(node):
        node.replace_all_uses_with(graph.call(chosen.overload, ids, panels))
    graph.module.graph.erase_node(node)


def _packed(graph: RegionGraph, weight: Node, packing: str) -> Node:
    """The parameter in its packed layout; made once for all its readers."""
    recipe = graph.recipe_of(weight)
    assert recipe is not None, f"{weight.name} is no parameter, so it cannot be packed ahead of time"
    wanted = Recipe(recipe.sources, packing)
    for node in graph.placeholders:
        if graph.recipe_of(node) == wanted:
            return node
    namespace, name = packing.split("::")
    fake = getattr(getattr(torch.ops, namespace), name)(weight.meta["val"])
    return graph.new_parameter(f"{weight.name}_packed", wanted, fake)


def _first_tensor(node: Node) -> torch.Tensor:
    first = node.args[0]
    assert isinstance(first, Node)
    value = first.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value
