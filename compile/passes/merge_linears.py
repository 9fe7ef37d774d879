"""Join products of one input into one: q/k/v, gate/up. Their weights become one parameter, made when weights are bound.

One large product beats several small ones: fewer launches and parallel regions, and at few rows it reads memory in longer runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from toka.compile.products import Product, product_of
from toka.compile.region_graph import Recipe, RegionGraph, fake_result

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext

aten = torch.ops.aten


def run(graph: RegionGraph, context: PassContext) -> RegionGraph:
    """Edit the graph in place and return it."""
    groups: dict[Hashable, list[tuple[Node, Product]]] = defaultdict(list)
    for node in graph.module.graph.nodes:
        product = product_of(node)
        if product is not None and _is_as_loaded(graph, product):
            groups[_likeness(graph, product)].append((node, product))
    for members in groups.values():
        if len(members) > 1:
            _merge(graph, members)
    return graph.finish()


def _merge(graph: RegionGraph, members: list[tuple[Node, Product]]) -> None:
    nodes, products = zip(*members, strict=True)
    first = products[0]
    operands = tuple(_joined(graph, tensors) for tensors in zip(*(each.operands for each in products), strict=True))
    bias = _joined(graph, tuple(each.bias for each in products))
    with graph.module.graph.inserting_before(nodes[0]):
        merged = Product(first.target, first.x, operands, bias, first.constants).insert(graph)
        start = 0
        for node, product in members:
            stop = start + product.out_features
            node.replace_all_uses_with(graph.call(aten.slice.Tensor, merged, 1, start, stop))
            start = stop
    _refresh(graph)


def _joined(graph: RegionGraph, parts: tuple[Node | None, ...]) -> Node | None:
    """One parameter of the parts of several weights; None if they lack that part."""
    nodes = [part for part in parts if part is not None]
    if not nodes:
        return None
    sources = [source for node in nodes if (recipe := graph.recipe_of(node)) is not None for source in recipe.sources]
    values = [node.meta["val"] for node in nodes]
    fake = values[0].new_empty((sum(value.shape[0] for value in values), *values[0].shape[1:]))
    return graph.new_parameter("_and_".join(node.name for node in nodes), Recipe.joined(*sources), fake)


def _is_as_loaded(graph: RegionGraph, product: Product) -> bool:
    """Whether weight and bias are the model's own parameters."""
    recipes = [graph.recipe_of(node) for node in (*product.operands, product.bias) if node is not None]
    return all(recipe is not None and recipe.is_as_loaded for recipe in recipes)


def _likeness(graph: RegionGraph, product: Product) -> Hashable:
    """Equal for products that can be joined."""
    parts = tuple(
        None if node is None else (node.meta["val"].dtype, tuple(node.meta["val"].shape[1:]))
        for node in product.operands
    )
    recipe = graph.recipe_of(product.operands[0])
    assert recipe is not None
    placements = repr(sorted(graph.placements[recipe.sources[0]].items()))
    return product.x, product.target, product.constants, product.bias is not None, parts, placements


def _refresh(graph: RegionGraph) -> None:
    """The slices have other strides than the products had: bring the views of them up to date."""
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view:
            node.meta["val"] = fake_result(node)
