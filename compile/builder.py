"""Makes an artifact: trace, passes, lower, for every region of a step (floor 4)."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from toka.compile import artifact, forked, lower
from toka.compile.artifact import Identity, KernelEntry, RegionEntry
from toka.compile.forked import run_forked, run_in_turn
from toka.compile.passes.select_kernels import ChosenKernel, KernelChooser
from toka.compile.pipeline import PassContext, run_passes
from toka.compile.region_graph import RegionGraph
from toka.compile.step_graph import StepGraph
from toka.compile.trace import trace


def transform(
    graph: StepGraph, device: torch.device, choose_kernel: KernelChooser, dump: Path | None = None
) -> tuple[list[RegionGraph], list[ChosenKernel]]:
    """Every region traced and through all passes, and the kernels chosen. dump: a directory for the graphs (see `dump_graphs`)."""
    context = PassContext(choose_kernel)
    if dump is not None:
        context = PassContext(choose_kernel, on_graph=dump_graphs(dump))
    regions = [run_passes(trace(region, device), context) for region in graph.regions]
    for follow_up in graph.follow_ups:
        spec = follow_up.inputs[0][1]
        sizes = [size if isinstance(size, int) else 1 for size in spec.shape]
        chosen = choose_kernel(follow_up.op, torch.empty(sizes, dtype=spec.dtype, device="meta"))
        if chosen not in context.chosen:
            context.chosen.append(chosen)
    return regions, context.chosen


def build_artifact(
    target: Path,
    regions: Sequence[RegionGraph],
    device: torch.device,
    identity: Identity,
    chosen: Sequence[ChosenKernel],
    libraries: Callable[[], Sequence[Path]],
    made_with: dict[str, str],
    *,
    max_processes: int = 1,
    on_region: Callable[[], None] = lambda: None,
) -> None:
    """Compile transformed regions into the directory `target`, with the kernel libraries that they call.

    libraries: asked at the end, so that they may be built meanwhile. max_processes: regions compiled at once, where that is
    possible. on_region: called when one is done. Raises ConfigError if the compiler fails.
    """
    lower.import_compiler()  # once, for all the forks
    with artifact.publish(target) as directory:
        calls = [partial(lower.compile_to_file, region, directory / f"{region.name}.pt2") for region in regions]
        run = run_forked(calls, max_processes) if forked.is_possible(device.type) else run_in_turn(calls)
        seconds = {}
        for index, took_s in run:
            seconds[index] = took_s
            on_region()
        entries = tuple(
            RegionEntry(region.name, f"{region.name}.pt2", tuple(region.recipes), seconds[index])
            for index, region in enumerate(regions)
        )
        names = []
        for library in libraries():
            shutil.copy2(library, directory / library.name)
            names.append(library.name)
        artifact.write_manifest(directory, identity, entries, kernel_entries(chosen), tuple(names), made_with)


def kernel_entries(chosen: Iterable[ChosenKernel]) -> tuple[KernelEntry, ...]:
    """The choice as a manifest and a report keep it."""
    return tuple(KernelEntry(each.op, str(each.overload), each.reason) for each in chosen)


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
