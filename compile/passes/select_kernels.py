"""Put in place of every `toka.*` operator and every product the kernel that the registry chooses, once and for all.

The traced graph calls each operator's plain-torch reference, so it runs anywhere; after this pass it calls, say, the C++ kernel.
A kernel that wants its weight packed gets it so: the parameter's recipe says that it is packed when weights are bound. An
embedding table is packed with it, since it often is the LM head's weight too and should be kept once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._ops import OpOverload
from torch.fx import Node

from toka.compile.products import Product, product_of
from toka.compile.region_graph import Recipe, RegionGraph

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext

aten = torch.ops.aten
_EMBEDDINGS = (aten.embedding.default, torch.ops.toka.embedding_quantised.default)


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
        if (product := product_of(node)) is not None:
            _replace_product(graph, node, product, _choose(node, _first_tensor(node), context))
        elif node.target in _EMBEDDINGS and graph.recipe_of(_table_of(node)[0]) is not None:
            _replace_embedding(graph, node, _choose(node, node.meta["val"], context))
        elif node.target.namespace == "toka":
            node.target = _choose(node, _first_tensor(node), context).overload
    return graph.finish()


def _choose(node: Node, tensor: torch.Tensor, context: PassContext) -> ChosenKernel:
    assert isinstance(node.target, OpOverload)
    chosen = context.choose_kernel(node.target._schema.name.partition("::")[2], tensor)
    if chosen not in context.chosen:
        context.chosen.append(chosen)
    return chosen


def _replace_product(graph: RegionGraph, node: Node, product: Product, chosen: ChosenKernel) -> None:
    if chosen.packing is None:
        if chosen.overload is not product.target:
            with graph.module.graph.inserting_before(node):
                node.replace_all_uses_with(dataclasses.replace(product, target=chosen.overload).insert(graph))
            graph.module.graph.erase_node(node)
        return
    panels, layout = _packed(graph, product.operands, product.constants[:1], chosen.packing)
    arguments = (product.x, panels, product.bias, product.out_features, *layout, *product.constants[1:])
    with graph.module.graph.inserting_before(node):
        node.replace_all_uses_with(graph.call(chosen.overload, *arguments))
    graph.module.graph.erase_node(node)


def _table_of(node: Node) -> tuple[Node | None, ...]:
    """The tensors that store an embedding's weight."""
    operands = node.args[:1] if node.target is aten.embedding.default else node.args[1:4]
    return operands  # type: ignore[return-value]


def _replace_embedding(graph: RegionGraph, node: Node, chosen: ChosenKernel) -> None:
    if chosen.packing is None:
        node.target = chosen.overload
        return
    table = _table_of(node)
    if node.target is aten.embedding.default:
        panels, _ = _packed(graph, table, (), chosen.packing)
        arguments: tuple[object, ...] = (node.args[1], panels)
    else:
        ids, (bits, dtype) = node.args[0], node.args[4:]
        panels, layout = _packed(graph, table, (bits,), chosen.packing)  # type: ignore[arg-type]
        arguments = (ids, panels, node.meta["val"].shape[1], *layout, dtype)
    with graph.module.graph.inserting_before(node):
        node.replace_all_uses_with(graph.call(chosen.overload, *arguments))
    graph.module.graph.erase_node(node)


def _packed(
    graph: RegionGraph, weight: tuple[Node | None, ...], constants: tuple[int, ...], packing: str
) -> tuple[Node, tuple[object, ...]]:
    """A weight in its packed layout, made once for all its readers, and what these must be told of it.

    constants: of quantised codes their bits; then told are bits, number of groups, and whether there are minimums.
    """
    operands = [node for node in weight if node is not None]
    recipes = [graph.recipe_of(node) for node in operands]
    assert all(recipes), f"{operands[0].name} is no parameter, so it cannot be packed ahead of time"
    wanted = Recipe(tuple(recipe.sources for recipe in recipes if recipe is not None), packing, constants)
    layout: tuple[object, ...] = ()
    if constants:
        layout = (*constants, operands[1].meta["val"].shape[1], len(operands) == len(weight))
    for node in graph.placeholders:
        if graph.recipe_of(node) == wanted:
            return node, layout
    namespace, name = packing.split("::")
    fake = getattr(getattr(torch.ops, namespace), name)(*constants, *(node.meta["val"] for node in operands))
    return graph.new_parameter(f"{operands[0].name}_packed", wanted, fake), layout


def _first_tensor(node: Node) -> torch.Tensor:
    first = node.args[0]
    assert isinstance(first, Node)
    value = first.meta["val"]
    assert isinstance(value, torch.Tensor)
    return value
