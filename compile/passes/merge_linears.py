"""Join products of one input into one: q/k/v, gate/up. Their weights become one parameter, made when weights are bound.

One large product beats several small ones: fewer launches and parallel regions, and at few rows it reads memory in longer runs.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from toka.compile.region_graph import Recipe, RegionGraph, fake_result

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext

aten = torch.ops.aten


def run(graph: RegionGraph, context: PassContext) -> RegionGraph:
    """Edit the graph in place and return it."""
    groups: dict[tuple[Node, bool, str], list[Node]] = defaultdict(list)
    for node in graph.module.graph.nodes:
        if node.target is aten.linear.default and _weight_of(graph, node) is not None:
            x = node.args[0]
            assert isinstance(x, Node)
            groups[x, len(node.args) > 2 and node.args[2] is not None, _placements(graph, node)].append(node)
    for (x, has_bias, _), linears in groups.items():
        if len(linears) > 1:
            _merge(graph, x, linears, has_bias)
    return graph.finish()


def _merge(graph: RegionGraph, x: Node, linears: list[Node], has_bias: bool) -> None:
    weight = _joined(graph, [linear.args[1] for linear in linears])
    bias = _joined(graph, [linear.args[2] for linear in linears]) if has_bias else None
    with graph.module.graph.inserting_before(linears[0]):
        merged = graph.call(aten.linear.default, x, weight, bias)
        start = 0
        for linear in linears:
            stop = start + linear.meta["val"].shape[1]
            linear.replace_all_uses_with(graph.call(aten.slice.Tensor, merged, 1, start, stop))
            start = stop
    _refresh(graph)


def _joined(graph: RegionGraph, parts: list[object]) -> Node:
    recipes = [recipe for part in parts if (recipe := graph.recipe_of(part)) is not None]
    values = [part.meta["val"] for part in parts if isinstance(part, Node)]
    sources = tuple(source for recipe in recipes for source in recipe.sources)
    size = sum(value.shape[0] for value in values)
    fake = values[0].new_empty((size, *values[0].shape[1:]))
    return graph.new_parameter(
        "_and_".join(part.name for part in parts if isinstance(part, Node)), Recipe(sources), fake
    )


def _weight_of(graph: RegionGraph, linear: Node) -> Recipe | None:
    """The recipe of the product's weight, if that and the bias are parameters as loaded."""
    operands = [operand for operand in linear.args[1:] if operand is not None]
    recipes = [graph.recipe_of(operand) for operand in operands]
    return recipes[0] if all(recipe is not None and recipe.is_as_loaded for recipe in recipes) else None


def _placements(graph: RegionGraph, linear: Node) -> str:
    recipe = _weight_of(graph, linear)
    assert recipe is not None
    return repr(sorted(graph.placements[recipe.sources[0]].items()))


def _refresh(graph: RegionGraph) -> None:
    """The slices have other strides than the products had: bring the views of them up to date."""
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
            node.meta["val"] = fake_result(node)
