"""A step graph that can be built, warmed, frozen and run (floor 4)."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.export import ExportedProgram

from toka.compile import artifact, lower
from toka.compile.passes.select_kernels import ChosenKernel, KernelChooser
from toka.compile.pipeline import PASSES, PassContext, run_passes
from toka.compile.step_graph import Call, Region, StepGraph
from toka.compile.trace import trace
from toka.errors import LateCompileError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompileOptions:
    """device: where the graph runs. compile: False runs it eagerly. cache_path: where compiled regions are kept.

    choose_kernel: the registry's choice for an operator and dtype. kernels_fingerprint: changes when a kernel's source does.
    """

    device: torch.device
    compile: bool
    cache_path: Path
    choose_kernel: KernelChooser
    kernels_fingerprint: str


@dataclass(frozen=True)
class BuiltRegion:
    """seconds: what building took; cached: whether the code was found in the cache."""

    name: str
    seconds: float
    cached: bool


class CompiledModel:
    """Runs a StepGraph. Life: `build` → `bind` → `run` (any bucket, to warm it) → `freeze` → `run`.

    After `freeze` a compile by us or by torch.compile anywhere in this process is counted in `compiles_after_freeze` and logged as an
    error; `build` refuses outright. A served request never pays for our mistake with its life, but every test looks at the counter.
    """

    def __init__(self, graph: StepGraph, options: CompileOptions):
        self.graph = graph
        self.chosen_kernels: list[ChosenKernel] = []
        self.compiles_after_freeze = 0
        self._options = options
        self._frozen = False
        self._code: dict[str, lower.RegionCode] = {}
        self._bound: list[_BoundCall] = []

    def build(self, on_region: Callable[[str], None] = lambda name: None) -> list[BuiltRegion]:
        """Trace, transform and lower every region, or load it from the cache. `on_region` hears each name before work on it begins."""
        if self._frozen:
            self._late("build() was called")
            raise LateCompileError("build() after freeze()")
        return [self._build_region(region, on_region) for region in self.graph.regions]

    def _build_region(self, region: Region, on_region: Callable[[str], None]) -> BuiltRegion:
        name = region.name
        on_region(name)
        began = time.perf_counter()
        context = PassContext(self._options.choose_kernel, self.chosen_kernels)
        program = run_passes(trace(region, self._options.device), context).program
        cached = False
        if self._options.compile:
            self._code[name], cached = self._load_or_compile(name, program)
        else:
            self._code[name] = lower.eager(program)
        return BuiltRegion(name, time.perf_counter() - began, cached)

    def _load_or_compile(self, name: str, program: ExportedProgram) -> tuple[lower.RegionCode, bool]:
        passes = " ".join(f"{each.name}={each.version}" for each in PASSES)
        key = artifact.fingerprint(program, passes, self._options.kernels_fingerprint)
        path = artifact.region_path(self._options.cache_path, name, key)
        if path.exists():
            try:
                return lower.load_compiled(path), True
            except RuntimeError as error:
                log.warning(
                    "the cached %s is damaged (%s); compiling it again", path.name, str(error).splitlines()[0][:200]
                )
        lower.compile_to_file(program, path)
        return lower.load_compiled(path), False

    def bind(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Give the model its tensors, by the names that the graph's calls use."""
        self._bound = [
            _BoundCall(self._code[call.region], [parameters[name] for name in call.parameters], call)
            for call in self.graph.calls
        ]

    def freeze(self) -> None:
        """From now on a compile is a bug: see the class."""
        self._frozen = True
        weak = weakref.ref(self)  # the hook is the process's; it must not keep the weights alive

        def on_compile(args: object) -> None:
            if (model := weak()) is not None:
                model._late(f"torch compiled {args}")

        hooks = torch._dynamo.callback.callback_handler
        hooks.register_start_callback(on_compile)
        weakref.finalize(self, hooks.remove_start_callback, on_compile)

    def _late(self, what: str) -> None:
        self.compiles_after_freeze += 1
        log.error("compile after ready: %s", what)

    def warm(self, values: Mapping[str, torch.Tensor]) -> None:
        """Run every region once on a bucket's values: all code that a whole step would run, in a fraction of its time."""
        known, seen = dict(values), set()
        for bound in self._bound:
            if bound.call.region not in seen:
                seen.add(bound.call.region)
                bound.run(known)

    def run(self, values: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run one step. values: a tensor for each of the graph's inputs; returns the graph's outputs."""
        known = dict(values)
        for call in self._bound:
            call.run(known)
        return tuple(known[name] for name in self.graph.outputs)


@dataclass(frozen=True)
class _BoundCall:
    code: lower.RegionCode
    parameters: list[torch.Tensor]
    call: Call

    def run(self, values: dict[str, torch.Tensor]) -> None:
        results = self.code([*self.parameters, *[values[name] for name in self.call.inputs]])
        values.update(zip(self.call.outputs, results, strict=True))
