"""The model's compiled code: found, given, or built (floor 6).

artifact=DIR   must be whole and made for just this; anything else is an error
the cache      used if it is; a damaged one is made again
neither        kernels are built, every region is traced, transformed and compiled, and the result is kept in the cache
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import toka
from toka.compile import artifact, builder, lower
from toka.compile.artifact import Artifact, Identity, KernelEntry
from toka.compile.compiled_model import CompiledModel, LoadedRegion, eager_regions, load_regions
from toka.compile.passes.select_kernels import ChosenKernel
from toka.compile.pipeline import PASSES
from toka.compile.step_graph import StepGraph
from toka.config import num_available_cores
from toka.errors import ConfigError
from toka.kernels import registry
from toka.kernels.cpp import build as cpp_build
from toka.kernels.registry import Trait
from toka.kernels.triton import library as triton_library
from toka.models.decoder import CausalLM
from toka.models.encoder import Encoder
from toka.runner.pooling_program import graph_of
from toka.warmup.progress import WarmupProgress
from toka.warmup.report import RegionReport, WarmupReport
from toka.warmup.setup import EngineSetup
from toka.weights.weight import Weight

log = logging.getLogger(__name__)

# With all of models, compile and kernels: the sources that decide what a graph looks like. A change in any makes a new artifact.
_SOURCE_FILES = (
    "runner/step_program.py",
    "runner/pooling_program.py",
    "weights/weight.py",
    "weights/integer_codes.py",
    "placement.py",
    "params.py",
)

# Operators whose first tensor is [T, H, D]: which kernel can serve them depends on D.
_OVER_HEADS = frozenset({"paged_attention", "encoder_attention", "rope_write_kv", "write_kv"})


def obtain(
    model: CausalLM | Encoder, setup: EngineSetup, progress: WarmupProgress, report: WarmupReport
) -> CompiledModel:
    """The model's step as code, ready to be bound. model: may be on the meta device.

    Raises ConfigError if the artifact that was asked for does not fit, or if there is no compiler and one is needed.
    """
    graph = graph_of(model, setup.pooling, setup.dtype, setup.config.block_size)
    if not setup.config.torch_compile:
        regions, kernels = _eager(graph, setup, progress, report)
        return CompiledModel(graph, regions, _overloads(kernels))
    found = obtain_artifact(model, graph, setup, progress)
    with progress.phase("load code"):
        for library in found.manifest.libraries:
            cpp_build.load(found.directory / library)
        if setup.device.type == "cuda":
            triton_library.load()
        regions = load_regions(found, setup.device)
    _note(report, found.manifest.kernels)
    report.artifact = str(found.directory)
    report.regions = [RegionReport(entry.name, entry.seconds) for entry in found.manifest.regions]
    return CompiledModel(graph, regions, _overloads(found.manifest.kernels))


def obtain_artifact(
    model: CausalLM | Encoder, graph: StepGraph, setup: EngineSetup, progress: WarmupProgress
) -> Artifact:
    """The artifact that this start needs; made if the cache has none."""
    wanted = identity(model, setup)
    if setup.config.artifact_path is not None:
        return artifact.open_given(setup.config.artifact_path, wanted)
    target = setup.config.cache_path / "artifacts" / artifact.key_of(wanted)
    if target.exists():
        try:
            return artifact.open_artifact(target)
        except artifact.DamagedArtifactError as error:
            log.warning("%s; compiling again", error)
            artifact.discard(target)
    _build(target, graph, wanted, setup, progress)
    return artifact.open_artifact(target)


def dump_passes(graph: StepGraph, setup: EngineSetup, directory: Path) -> None:
    """Write every region's graph after each pass, and what the pass changed, into the directory."""
    builder.transform(graph, setup.device, kernel_chooser(setup, families_of(setup.device)), directory)


def identity(model: CausalLM | Encoder, setup: EngineSetup) -> Identity:
    """All that shapes the code, field by field (see compile/artifact.py)."""
    config = setup.config
    formats = {name: module.format for name, module in model.named_modules() if isinstance(module, Weight)}
    return {
        **artifact.environment(setup.device),
        "sources": artifact.sources_fingerprint(_sources()),
        "kernels": cpp_build.sources_fingerprint(),
        "passes": " ".join(f"{each.name}={each.version}" for each in PASSES),
        "inductor": str(sorted(lower.INDUCTOR_OPTIONS.items())),
        "device": config.device,
        "threads": f"{config.num_threads}",  # inductor writes them into its parallel loops
        "mesh": "one rank",
        "sizes": "symbolic, from 1",
        "dtype": config.dtype,
        "formats": " ".join(sorted({each.name for each in formats.values()})),
        "format of each weight": hashlib.sha256(repr(formats).encode()).hexdigest()[:16],
        "page_size": str(config.block_size),
        "batch_invariant": str(config.batch_invariant),
        "pooling": "none" if setup.pooling is None else f"{setup.pooling.task} {setup.pooling.mode}",
        **{f"model.{field.name}": repr(getattr(setup.spec, field.name)) for field in dataclasses.fields(setup.spec)},
    }


def kernel_chooser(setup: EngineSetup, families: set[str]) -> Callable[[str, torch.Tensor], ChosenKernel]:
    """The registry's choice for this device; with batch_invariant=T only among kernels that are."""
    traits = (Trait.BATCH_INVARIANT,) if setup.config.batch_invariant else ()

    def choose(op: str, first_tensor: torch.Tensor) -> ChosenKernel:
        head_dim = int(first_tensor.shape[-1]) if op in _OVER_HEADS else None
        kernel = registry.choose(
            op, setup.device.type, first_tensor.dtype, families=families, head_dim=head_dim, traits=traits
        )
        return ChosenKernel(op, kernel.overload, kernel.reason, kernel.implementation.packing or None)

    return choose


def families_of(device: torch.device) -> set[str]:
    """Families of kernels that a device's compiled code may call."""
    return {"reference", "torch", "cpp"} if device.type == "cpu" else {"reference", "torch", "triton"}


def is_batch_invariant(kernels: Iterable[KernelEntry]) -> bool:
    """Whether every chosen kernel promises it."""
    return all(
        Trait.BATCH_INVARIANT in implementation.traits
        for kernel in kernels
        for implementation in registry.implementations(kernel.op)
        if str(implementation.overload) == kernel.overload
    )


def _build(target: Path, graph: StepGraph, wanted: Identity, setup: EngineSetup, progress: WarmupProgress) -> None:
    """Make an artifact. The C++ kernels' compiler runs while the graphs are traced and compiled: neither needs the other's result.

    Triton kernels are not in it: Triton compiles them when they first run, in the warmup, and keeps them in a cache of its own.
    """
    config = setup.config
    made_with = {"toka": toka.__version__, "compiler": cpp_build.find_compiler(config.cxx)}
    with ThreadPoolExecutor(max_workers=1) as pool:
        libraries = []
        if setup.device.type == "cpu":
            libraries.append(pool.submit(cpp_build.build, config.cache_path, config.cxx))
        with progress.phase("trace"):
            chooser = kernel_chooser(setup, families_of(setup.device))
            regions, chosen = builder.transform(graph, setup.device, chooser)
        with progress.phase("compile", num_parts=len(regions)):
            builder.build_artifact(
                target,
                regions,
                setup.device,
                wanted,
                chosen,
                lambda: [library.result() for library in libraries],
                made_with,
                max_processes=num_available_cores() + 1,  # one more, so that no core waits for the last one
                on_region=progress.advance,
            )


def _eager(
    graph: StepGraph, setup: EngineSetup, progress: WarmupProgress, report: WarmupReport
) -> tuple[dict[str, LoadedRegion], tuple[KernelEntry, ...]]:
    families = {"reference", "torch"}
    try:
        with progress.phase("kernels"):
            if setup.device.type == "cuda":
                triton_library.load()
            else:
                cpp_build.load(cpp_build.build(setup.config.cache_path, setup.config.cxx, progress.detail))
            families = families_of(setup.device)
    except ConfigError as error:
        log.warning("torch_compile=F runs on the plain-torch reference kernels, many times slower, since %s", error)
    with progress.phase("trace"):
        graphs, chosen = builder.transform(graph, setup.device, kernel_chooser(setup, families))
    kernels = builder.kernel_entries(chosen)
    _note(report, kernels)
    return eager_regions(graphs), kernels


def _overloads(kernels: Iterable[KernelEntry]) -> dict[str, str]:
    return {kernel.op: kernel.overload for kernel in kernels}


def _note(report: WarmupReport, kernels: tuple[KernelEntry, ...]) -> None:
    report.kernels = {kernel.op: f"{kernel.overload} ({kernel.reason})" for kernel in kernels}
    report.batch_invariant = is_batch_invariant(kernels)


def _sources() -> list[Path]:
    import toka.compile
    import toka.kernels
    import toka.models

    rooms = [Path(room.__path__[0]) for room in (toka.compile, toka.kernels, toka.models)]
    package = Path(toka.__path__[0])
    return [path for room in rooms for path in room.rglob("*.py")] + [package / file for file in _SOURCE_FILES]
