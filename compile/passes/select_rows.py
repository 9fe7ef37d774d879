"""Drop the computing of rows that need no logits.

The step's last region computes a layer for all T tokens and then keeps the S whose logits are wanted: `hidden[index]`. This pass
moves that selection towards the inputs, through every operator whose rows do not mix, as far as a value has no reader that wants
all rows. Attention takes it too: each selected token attends as a row of its own with one query. What is left
for all T tokens is what others will read later, the keys and values in the cache (and the norm before them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from toka.compile.products import product_of
from toka.compile.region_graph import RegionGraph, RowSelection, fake_result

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext

aten = torch.ops.aten
_ATTENTION = torch.ops.toka.paged_attention.default
_ATTENTION_ROWS, _ATTENTION_STARTS, _ATTENTION_LENS = 4, 5, 6  # places of these arguments in its schema

# Operators that keep dim 0 apart if the dims that they name are others; the value is the place of those dims among the arguments.
_DIM_ARGUMENT = {
    aten.mean.dim: 1,
    aten.sum.dim_IntList: 1,
    aten.unsqueeze.default: 1,
    aten.flatten.using_ints: 1,
    aten.unflatten.int: 1,
    aten.chunk.default: 2,
    aten.cat.default: 1,
    aten.slice.Tensor: 1,
}


def run(graph: RegionGraph, context: PassContext) -> RegionGraph:
    """Edit the graph in place and return it; a region without a selection is left alone."""
    if graph.selection is None:
        return graph
    index = graph.input_node(graph.selection.index)
    selections = [node for node in index.users if node.target is aten.index.Tensor and node.args[1] == [index]]
    for node in selections:
        _push(graph, graph.selection, node, index)
    return graph.finish()


def _push(graph: RegionGraph, names: RowSelection, selection: Node, index: Node) -> None:
    source = selection.args[0]
    assert isinstance(source, Node)
    num_rows = source.meta["val"].shape[0]
    movable = _movable(graph, selection, num_rows)
    selected: dict[Node, Node] = {}

    def select(argument: object) -> object:
        """The argument for the selected rows only."""
        if isinstance(argument, list | tuple):
            return type(argument)(select(item) for item in argument)
        if not isinstance(argument, Node) or not _has_rows(argument, num_rows):
            return argument
        if argument not in selected:
            selected[argument] = graph.call(aten.index.Tensor, argument, [index])
        return selected[argument]

    # New nodes stand before the selection, so after everything that it depends on.
    with graph.module.graph.inserting_before(selection):
        for node in graph.module.graph.nodes:
            if node not in movable:
                continue
            arguments = [select(argument) for argument in node.args]
            if node.target is _ATTENTION:
                arguments[_ATTENTION_ROWS] = graph.input_node(names.rows)
                arguments[_ATTENTION_STARTS] = graph.input_node(names.query_start)
                arguments[_ATTENTION_LENS] = graph.input_node(names.seq_lens)
            selected[node] = _call_like(graph, node, arguments)
    selection.replace_all_uses_with(selected[source])


def _call_like(graph: RegionGraph, node: Node, arguments: list[Any]) -> Node:
    new = graph.module.graph.create_node("call_function", node.target, tuple(arguments), dict(node.kwargs))
    new.meta["val"] = fake_result(new)
    return new


def _movable(graph: RegionGraph, selection: Node, num_rows: torch.SymInt) -> set[Node]:
    """Nodes that are read, through others of the set, by the selection alone, and whose rows do not mix."""
    movable: set[Node] = set()
    for node in reversed(graph.module.graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        if all(user is selection or user in movable for user in node.users) and _keeps_rows_apart(node, num_rows):
            movable.add(node)
    return movable


def _keeps_rows_apart(node: Node, num_rows: torch.SymInt) -> bool:
    """Whether row i of the result is made of row i of those arguments that have rows, and of nothing else that has."""
    if not _has_rows(node, num_rows):
        return False
    if node.target is _ATTENTION:
        return True
    if product_of(node) is not None:
        return all(not _has_rows(argument, num_rows) for argument in node.args[1:])
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target.__name__ == "getitem"  # type: ignore[union-attr]
    if node.target in _DIM_ARGUMENT:
        return _other_dims(node)
    if torch.Tag.pointwise not in node.target.tags and node.target is not aten.to.dtype:
        return False
    rank = node.meta["val"].dim()  # an argument of lower rank is broadcast: its dim 0 is not ours
    return all(arg.meta["val"].dim() == rank for arg in _node_arguments(node) if _has_rows(arg, num_rows))


def _other_dims(node: Node) -> bool:
    place = _DIM_ARGUMENT[node.target]  # type: ignore[index]
    given = node.args[place] if place < len(node.args) else 0
    dims = given if isinstance(given, list | tuple) else [given]
    first = next(_node_arguments(node)).meta["val"]
    rank = first.dim() + (1 if node.target is aten.unsqueeze.default else 0)
    return all(isinstance(dim, int) and dim % rank != 0 for dim in dims)


def _node_arguments(node: Node) -> Iterator[Node]:
    for argument in node.args:
        yield from (
            item for item in (argument if isinstance(argument, list | tuple) else [argument]) if isinstance(item, Node)
        )


def _has_rows(value: object, num_rows: torch.SymInt) -> bool:
    """Whether dim 0 is the batch's: its symbolic size is that of the hidden states."""
    if not isinstance(value, Node):
        return False
    fake = value.meta.get("val")
    if isinstance(fake, list | tuple):
        return all(isinstance(item, torch.Tensor) and _is_size(item.shape[0], num_rows) for item in fake)
    return isinstance(fake, torch.Tensor) and fake.dim() > 0 and _is_size(fake.shape[0], num_rows)


def _is_size(size: object, other: torch.SymInt) -> bool:
    """Compared as expressions: comparing sizes as such would add a guard."""
    return isinstance(size, torch.SymInt) and size.node.expr == other.node.expr
