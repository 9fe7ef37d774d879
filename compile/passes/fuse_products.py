"""Draw what stands around a packed product into it: the norm or the gate before, the residual behind.

A product's kernel reads each row before it multiplies and writes each result after; done there, the norm costs nothing beside the
product, and at few rows a parallel region, a buffer and a pass over memory less count as much as the arithmetic. What is fused is
computed in float32 from end to end, where the graph would have rounded in between.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch._ops import OpOverload
from torch.fx import Node

from toka.compile.region_graph import RegionGraph

if TYPE_CHECKING:
    from toka.compile.pipeline import PassContext

aten = torch.ops.aten

# The operators that take fusions, and how many arguments stand before them.
_NUM_ARGUMENTS: dict[OpOverload, int] = {
    overload: count
    for namespace in (torch.ops.toka, torch.ops.toka_cpp)
    for overload, count in ((namespace.linear_packed.default, 4), (namespace.linear_quantised_packed.default, 8))
}
_CASTS = (aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class _Fusions:
    """The arguments of a product that say what is fused, in the schema's order, and what it then reads."""

    x: Node
    norm_weight: Node | None = None
    norm_eps: float = 0.0
    gated: bool = False
    residual: Node | None = None

    @property
    def is_empty(self) -> bool:
        return self.norm_weight is None and not self.gated and self.residual is None


def run(graph: RegionGraph, context: PassContext) -> RegionGraph:
    """Edit the graph in place and return it."""
    for node in list(graph.module.graph.nodes):
        if node.op == "call_function" and node.target in _NUM_ARGUMENTS:
            _fuse(graph, node)
    return graph.finish()


def _fuse(graph: RegionGraph, product: Node) -> None:
    x = product.args[0]
    assert isinstance(x, Node)
    found = _Fusions(x)
    if len(x.users) == 1:
        found = _norm(x) or _gate(x) or found
    result, found = _residual(product, found)
    if found.is_empty:
        return
    others = product.args[1 : _NUM_ARGUMENTS[product.target]]  # type: ignore[index]
    with graph.module.graph.inserting_before(result):
        fused = graph.call(
            product.target,  # type: ignore[arg-type]
            found.x,
            *others,
            found.norm_weight,
            found.norm_eps,
            found.gated,
            found.residual,
        )
    result.replace_all_uses_with(fused)


def _norm(x: Node) -> _Fusions | None:
    """weight * (h * rsqrt(mean(h ** 2) + eps)), with any casts in between."""
    for weight, normed in _both_orders(x, aten.mul.Tensor):
        if weight.op != "placeholder" or weight.meta["val"].dim() != 1:
            continue
        for hidden, scale in _both_orders(_uncast(normed), aten.mul.Tensor):
            eps = _eps_of(scale, _uncast(hidden))
            if eps is not None:
                return _Fusions(_uncast(hidden), norm_weight=weight, norm_eps=eps)
    return None


def _eps_of(scale: Node, hidden: Node) -> float | None:
    """eps, if the node is rsqrt(mean(hidden ** 2) + eps) over the last dim."""
    if scale.target is not aten.rsqrt.default:
        return None
    total = scale.args[0]
    if not isinstance(total, Node) or total.target is not aten.add.Tensor or not isinstance(total.args[1], float):
        return None
    mean = total.args[0]
    if not isinstance(mean, Node) or mean.target is not aten.mean.dim or mean.args[1:3] != ([-1], True):
        return None
    square = mean.args[0]
    if not isinstance(square, Node) or square.target is not aten.pow.Tensor_Scalar or square.args[1] != 2:
        return None
    return total.args[1] if _uncast(square.args[0]) is hidden else None


def _gate(x: Node) -> _Fusions | None:
    """silu(y[:, :I]) * y[:, I:]."""
    for gate, up in _both_orders(x, aten.mul.Tensor):
        if gate.target is not aten.silu.default:
            continue
        first, size = gate.args[0], x.meta["val"].shape[1]
        if not isinstance(first, Node) or len(gate.users) > 1:
            continue
        if _slice_of(first) == (up.args[0], 0, size) and _slice_of(up) == (up.args[0], size, 2 * size):
            both = up.args[0]
            assert isinstance(both, Node)
            if both.meta["val"].shape[1] == 2 * size:
                return _Fusions(both, gated=True)
    return None


def _slice_of(node: Node) -> tuple[object, ...] | None:
    """What is sliced along dim 1, from where to where."""
    if node.target is not aten.slice.Tensor or len(node.args) != 4 or node.args[1] != 1:
        return None
    return node.args[0], *node.args[2:]


def _residual(product: Node, found: _Fusions) -> tuple[Node, _Fusions]:
    """The node whose value the fused product gives: the sum that is the product's only reader, or the product itself."""
    [user, *others] = [*product.users] or [product]
    if others or user.target is not aten.add.Tensor or len(user.args) != 2 or user.kwargs:
        return product, found
    [residual] = [argument for argument in user.args if argument is not product] or [None]
    if not isinstance(residual, Node) or not _alike(residual, product):
        return product, found
    return user, replace(found, residual=residual)


def _alike(one: Node, other: Node) -> bool:
    """Of the same dtype and shape, told without comparing symbolic sizes as such, which would add a guard."""
    first, second = one.meta["val"], other.meta["val"]
    return first.dtype == second.dtype and [str(size) for size in first.shape] == [str(size) for size in second.shape]


def _uncast(node: object) -> Node:
    assert isinstance(node, Node)
    while node.target in _CASTS:
        node = node.args[0]
        assert isinstance(node, Node)
    return node


def _both_orders(node: Node, target: OpOverload) -> list[tuple[Node, Node]]:
    """The two operands of a commutative operator, either one first; empty if the node is another."""
    if node.target is not target or not all(isinstance(argument, Node) for argument in node.args):
        return []
    first, second = node.args
    return [(first, second), (second, first)]  # type: ignore[list-item]
