"""`toka compile`: the artifact that a start with the same flags needs, without reading a weight (floor 6)."""

from __future__ import annotations

from pathlib import Path

import torch

from toka.compile import artifact
from toka.compile.artifact import Artifact
from toka.config import CompileFlags, hub_offline
from toka.errors import ConfigError
from toka.model_source import locate_configuration
from toka.runner.pooling_program import graph_of
from toka.warmup.code import dump_passes, obtain_artifact
from toka.warmup.progress import WarmupProgress
from toka.warmup.report import WarmupReport
from toka.warmup.setup import settle


def run(flags: CompileFlags) -> int:
    """Make the artifact or find it in the cache, copy it to out=, write the graphs to dump=; returns the exit status.

    Prints what was chosen and why. Raises ConfigError if a flag is wrong or the compiler fails.
    """
    if not flags.torch_compile:
        raise ConfigError("torch_compile=F: there is nothing to compile then; leave the flag out")
    setup = settle(flags, locate_configuration(flags.model, flags.cache_path(), offline=hub_offline()))
    report = WarmupReport()
    with WarmupProgress(report) as progress, torch.no_grad():
        model = setup.build_model()
        graph = graph_of(model, setup.pooling, setup.dtype, setup.config.block_size)
        if flags.dump is not None:  # traced for this alone: an artifact that is in the cache already has no graphs
            with progress.phase("dump"):
                dump_passes(graph, setup, Path(flags.dump).expanduser())
        made = obtain_artifact(model, graph, setup, progress)
    if flags.out is not None:
        artifact.copy_artifact(made, Path(flags.out).expanduser())
    print(_summary(made, flags))
    return 0


def _summary(made: Artifact, flags: CompileFlags) -> str:
    lines = [f"artifact: {flags.out or made.directory}"]
    lines += [f"  {region.name:<16} compiled in {region.seconds:.1f} s" for region in made.manifest.regions]
    lines.append("kernels:")
    lines += [f"  {kernel.op:<16} {kernel.overload}: {kernel.reason}" for kernel in made.manifest.kernels]
    if flags.dump is not None:
        lines.append(f"graphs after each pass, and what it changed: {flags.dump}")
    return "\n".join(lines)
