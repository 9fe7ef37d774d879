"""The ordered passes, on one page (floor 4).

Every pass has one signature, `run(graph, context) -> graph`, is followed by `graph_spec.verify`, and says how far its result may be from
its input's: 0.0 is bitwise, else the largest difference relative to the largest value of a tensor, in float32.
tests/compile/test_pass_numerics.py holds each of them to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from toka.compile import graph_spec
from toka.compile.passes import canonicalise, fuse_products, fuse_rope_write, merge_linears, select_kernels, select_rows
from toka.compile.passes.select_kernels import ChosenKernel, KernelChooser
from toka.compile.region_graph import RegionGraph


@dataclass(frozen=True)
class PassContext:
    """What passes may ask about: how kernels are chosen, and where they note what they chose.

    on_graph: hears the graph after every pass (region's name, index, pass's name, graph), "trace" first.
    """

    choose_kernel: KernelChooser
    chosen: list[ChosenKernel] = field(default_factory=list)
    on_graph: Callable[[int, str, RegionGraph], None] = lambda index, name, graph: None


@dataclass(frozen=True)
class Pass:
    """name and version enter the artifact's identity: raise the version whenever the result changes."""

    name: str
    version: int
    run: Callable[[RegionGraph, PassContext], RegionGraph]
    tolerance: float


PASSES: tuple[Pass, ...] = (
    # dead nodes, no-op casts and slices, and checks that tracing left go: a plain graph for those after
    Pass("canonicalise", 2, canonicalise.run, tolerance=0.0),
    # rows that need no logits stop after the last layer's KV write
    Pass("select_rows", 2, select_rows.run, tolerance=1e-5),
    # products of one input become one product: q/k/v, gate/up
    Pass("merge_linears", 2, merge_linears.run, tolerance=1e-5),
    # turning queries and keys and writing the cache become one operator
    Pass("fuse_rope_write", 1, fuse_rope_write.run, tolerance=1e-6),
    # toka.* and products become the best kernel for this device
    Pass("select_kernels", 3, select_kernels.run, tolerance=1e-4),
    # norms, gates and residuals become part of the products beside them
    Pass("fuse_products", 1, fuse_products.run, tolerance=1e-5),
)


def run_passes(graph: RegionGraph, context: PassContext) -> RegionGraph:
    """Run all passes over one region, verifying its graph before the first and after each."""
    graph_spec.verify(graph, "trace")
    context.on_graph(0, "trace", graph)
    for index, each in enumerate(PASSES, 1):
        graph = each.run(graph, context)
        graph_spec.verify(graph, each.name)
        context.on_graph(index, each.name, graph)
    return graph
