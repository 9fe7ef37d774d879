"""Makes an artifact: trace, passes, lower, for every region of a step (floor 4)."""

from __future__ import annotations

import difflib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from toka.compile import artifact, lower
from toka.compile.artifact import Identity, KernelEntry, RegionEntry
from toka.compile.passes.select_kernels import ChosenKernel, KernelChooser
from toka.compile.pipeline import PassContext, run_passes
from toka.compile.region_graph import RegionGraph
from toka.compile.step_graph import StepGraph
from toka.compile.trace import trace

Progress = Callable[[str], None]


def transform(
    graph: StepGraph, device: torch.device, choose_kernel: KernelChooser, dump: Path | None = None
) -> tuple[list[RegionGraph], list[ChosenKernel]]:
    """Every region traced and through all passes, and the kernels chosen. dump: a directory for the graphs (see `dump_graphs`)."""
    context = PassContext(choose_kernel)
    if dump is not None:
        context = PassContext(choose_kernel, on_graph=dump_graphs(dump))
    regions = [run_passes(trace(region, device), context) for region in graph.regions]
    return regions, context.chosen


def build_artifact(
    target: Path,
    graph: StepGraph,
    device: torch.device,
    identity: Identity,
    choose_kernel: KernelChooser,
    libraries: Sequence[Path],
    made_with: dict[str, str],
    on_region: Progress = lambda name: None,
) -> None:
    """Compile every region into the directory `target`, with the kernel libraries that they call.

    on_region: hears each region's name before work on it begins. Raises ConfigError if the compiler fails.
    """
    context = PassContext(choose_kernel)
    entries = []
    with artifact.publish(target) as directory:
        for region in graph.regions:
            on_region(region.name)
            began = time.perf_counter()
            lowered = run_passes(trace(region, device), context)
            lower.compile_to_file(lowered, directory / f"{region.name}.pt2")
            seconds = time.perf_counter() - began
            entries.append(RegionEntry(region.name, f"{region.name}.pt2", tuple(lowered.recipes), seconds))
        for library in libraries:
            shutil.copy2(library, directory / library.name)
        kernels = tuple(KernelEntry(each.op, str(each.overload), each.reason) for each in context.chosen)
        names = tuple(library.name for library in libraries)
        artifact.write_manifest(directory, identity, tuple(entries), kernels, names, made_with)


def dump_graphs(directory: Path) -> Callable[[int, str, RegionGraph], None]:
    """A PassContext.on_graph that writes DIR/<region>/<index>-<pass>.txt, and beside it the difference to the pass before (.diff)."""
    before: dict[str, str] = {}

    def write(index: int, name: str, graph: RegionGraph) -> None:
        folder = directory / graph.name
        folder.mkdir(parents=True, exist_ok=True)
        text = graph.to_text()
        stem = f"{index:02d}-{name}"
        (folder / f"{stem}.txt").write_text(text)
        if graph.name in before:
            lines = difflib.unified_diff(
                before[graph.name].splitlines(), text.splitlines(), "before", f"after {name}", lineterm="", n=2
            )
            (folder / f"{stem}.diff").write_text("\n".join(lines) + "\n")
        before[graph.name] = text

    return write
