"""Make one operator of turning queries and keys and writing keys and values into the cache.

Found by shape: the graph of `Rope.rotate` on the key that `toka.write_kv` stores and on the query that attends to that cache,
both by the same angles. What does not fit (a region whose queries are fewer than its keys) is left to inductor, which writes the
rotation itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

import toka.kernels.ops  # noqa: F401 (registers the operators)
from toka.compile.region_graph import RegionGraph

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext

aten = torch.ops.aten
_WRITE, _ATTENTION = torch.ops.toka.write_kv.default, torch.ops.toka.paged_attention.default


@dataclass(frozen=True)
class _Rotation:
    """x_THD turned by cos_TF and sin_TF."""

    x: Node
    cos: Node
    sin: Node


def run(graph: RegionGraph, context: PassContext) -> RegionGraph:
    """Edit the graph in place and return it."""
    for write in [node for node in graph.module.graph.nodes if node.target is _WRITE]:
        key, value, key_cache, value_cache, slots = write.args
        attentions = [
            node for node in key_cache.users if node.target is _ATTENTION and node.args[1:3] == (key_cache, value_cache)
        ]
        turned_key = _rotation(key)
        if turned_key is None or len(attentions) != 1:
            continue
        query = attentions[0].args[0]
        turned_query = _rotation(query)
        if turned_query is None or (turned_query.cos, turned_query.sin) != (turned_key.cos, turned_key.sin):
            continue
        if not _pays(turned_query.x, context):
            continue
        x, cos, sin = turned_query.x, turned_query.cos, turned_query.sin
        with graph.module.graph.inserting_before(write):
            fused = graph.call(
                torch.ops.toka.rope_write_kv.default, x, turned_key.x, value, cos, sin, key_cache, value_cache, slots
            )
        query.replace_all_uses_with(fused)
        graph.module.graph.erase_node(write)
    return graph.finish()


def _pays(query: Node, context: PassContext) -> bool:
    """Whether a device that has a fast kernel for the write has one for both together."""
    chosen = [context.choose_kernel(op, query.meta["val"]) for op in ("rope_write_kv", "write_kv")]
    fused, write = (kernel.overload.namespace != "toka" for kernel in chosen)
    return fused or not write


def _rotation(node: Any) -> _Rotation | None:
    """cat(first * cos - second * sin, second * cos + first * sin), of the halves of x's last dim."""
    if not isinstance(node, Node) or node.target is not aten.cat.default or node.args[1] != -1:
        return None
    parts: Any = node.args[0]
    difference, total = parts
    if difference.target is not aten.sub.Tensor or total.target is not aten.add.Tensor:
        return None
    products: list[Any] = [*difference.args, *total.args]
    if any(not isinstance(product, Node) or product.target is not aten.mul.Tensor for product in products):
        return None
    (first, cos), (second, sin), (second_again, cos_again), (first_again, sin_again) = (each.args for each in products)
    if (first, second, cos, sin) != (first_again, second_again, cos_again, sin_again):
        return None
    x, angles = _halved(first, second), (_widened(cos), _widened(sin))
    return None if x is None or angles[0] is None or angles[1] is None else _Rotation(x, angles[0], angles[1])


def _halved(first: Any, second: Any) -> Node | None:
    """What both are the halves of."""
    for half, index in ((first, 0), (second, 1)):
        if not isinstance(half, Node) or half.target is not getitem or half.args[1] != index:
            return None
    chunks = first.args[0]
    if chunks is not second.args[0] or chunks.target is not aten.chunk.default or chunks.args[1:] != (2, -1):
        return None
    x = chunks.args[0]
    assert isinstance(x, Node)
    return x


def _widened(angles: Any) -> Node | None:
    """What was given a dim for the heads."""
    if not isinstance(angles, Node) or angles.target is not aten.unsqueeze.default or angles.args[1] != 1:
        return None
    source = angles.args[0]
    assert isinstance(source, Node)
    return source
