"""The ordered passes, on one page (floor 4).

Every pass has one signature, `run(program, context) -> program`, says whether its result is bitwise that of its input (EXACT) or differs
within a stated tolerance, and is followed by `graph_spec.verify`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.export import ExportedProgram

from toka.compile import graph_spec
from toka.compile.passes import canonicalise, select_kernels
from toka.compile.passes.select_kernels import ChosenKernel, KernelChooser
from toka.compile.trace import TracedRegion


@dataclass(frozen=True)
class PassContext:
    """What passes may ask about: how kernels are chosen, and where they note what they chose."""

    choose_kernel: KernelChooser
    chosen: list[ChosenKernel]


@dataclass(frozen=True)
class Pass:
    """name and version enter the artifact's fingerprint: raise the version whenever the result changes."""

    name: str
    version: int
    run: Callable[[ExportedProgram, PassContext], ExportedProgram]
    tolerance: str  # "exact", or the bound


PASSES: tuple[Pass, ...] = (
    Pass("canonicalise", 1, canonicalise.run, "exact"),  # dead nodes and no-op slices go; a plain graph for those after
    Pass(
        "select_kernels", 1, select_kernels.run, "1e-5 of the reference in float32"
    ),  # toka.* becomes the best kernel for this device
)


def run_passes(traced: TracedRegion, context: PassContext) -> TracedRegion:
    """Run all passes over one region, verifying its graph before the first and after each."""
    program, name = traced.program, traced.region.name
    graph_spec.verify(program, name, "trace")
    for each in PASSES:
        program = each.run(program, context)
        graph_spec.verify(program, name, each.name)
    return TracedRegion(traced.region, program)
