"""A step graph with its compiled code: bound, warmed, frozen, run (floor 4)."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import operator
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

from toka.compile import lower
from toka.compile.artifact import Artifact
from toka.compile.region_graph import Recipe, RegionGraph
from toka.compile.step_graph import Call, StepGraph
from toka.errors import InvariantError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedRegion:
    """A region's code, and how each parameter that it takes is made from the model's."""

    code: lower.RegionCode
    recipes: tuple[Recipe, ...]


def load_regions(artifact: Artifact, device: torch.device) -> dict[str, LoadedRegion]:
    """An artifact's regions by name; its kernel libraries must be loaded already. RuntimeError if one cannot be loaded."""
    return {
        entry.name: LoadedRegion(lower.load_compiled(artifact.directory / entry.file, device), entry.recipes)
        for entry in artifact.manifest.regions
    }


def eager_regions(graphs: Sequence[RegionGraph]) -> dict[str, LoadedRegion]:
    """The same without a compiler: each graph is run node by node."""
    return {graph.name: LoadedRegion(lower.eager(graph), tuple(graph.recipes)) for graph in graphs}


class CompiledModel:
    """Runs a StepGraph. Life: `bind` → `run` (any bucket, to warm it) → `freeze` → `run`.

    kernels: operator → the kernel that was chosen ("toka_cpp.sample.default"), for the graph's follow-up; None: nobody asks for it.
    After `freeze` a compile by torch.compile or inductor anywhere in this process is counted in `compiles_after_freeze` and logged as an
    error. A served request never pays for our mistake with its life, but every test looks at the counter.
    """

    def __init__(self, graph: StepGraph, regions: Mapping[str, LoadedRegion], kernels: Mapping[str, str] | None = None):
        self.graph = graph
        self._follow_up_kernel: OpOverload | None = None
        if graph.follow_up is not None and kernels is not None:
            self._follow_up_kernel = _overload(kernels[graph.follow_up.op])
        self.compiles_after_freeze = 0
        self._regions = regions
        self._bound: list[_BoundCall] = []

    def bind(self, parameters: dict[str, torch.Tensor]) -> None:
        """Give the model its tensors, by the names that the graph's calls use.

        Takes the dict over and empties it: a tensor that only serves to make others (joined, packed) is freed as soon as they are
        made, if the caller keeps no other reference.
        """
        recipes = {call: self._recipes_of(call) for call in self.graph.calls}
        made = make_parameters([recipe for each in recipes.values() for recipe in each], parameters)
        self._bound = [
            _BoundCall(self._regions[call.region].code, [made[recipe] for recipe in recipes[call]], call)
            for call in self.graph.calls
        ]

    def _recipes_of(self, call: Call) -> list[Recipe]:
        """The recipes of a call's parameters, in the model's names."""
        [region] = [region for region in self.graph.regions if region.name == call.region]
        names = dict(zip(region.parameter_names(), call.parameters, strict=True))
        return [recipe.renamed(names) for recipe in self._regions[call.region].recipes]

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All tensors that are bound, each once."""
        return list({id(tensor): tensor for call in self._bound for tensor in call.parameters}.values())

    def freeze(self) -> None:
        """From now on a compile is a bug: see the class."""
        weak = weakref.ref(self)  # the hook is the process's; it must not keep the weights alive

        def on_compile(args: object) -> None:
            if (model := weak()) is not None:
                model.compiles_after_freeze += 1
                log.error("compile after ready: torch compiled %s", args)

        weakref.finalize(self, _watch_compiles(on_compile))

    def warm(self, values: Mapping[str, torch.Tensor], *, to_the_end: bool = True) -> tuple[torch.Tensor, ...]:
        """Run every region once on a bucket's values: all code that a whole step would run, in a fraction of its time.

        to_the_end: also the last one; then the outputs come back, which mean nothing.
        """
        known, seen = dict(values), set()
        for bound in self._bound if to_the_end else self._bound[:-1]:
            if bound.call.region not in seen:
                seen.add(bound.call.region)
                bound.run(known)
        return tuple(known[name] for name in self.graph.outputs) if to_the_end else ()

    def run(self, values: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Run one step. values: a tensor for each of the graph's inputs; returns the graph's outputs."""
        known = dict(values)
        for call in self._bound:
            call.run(known)
        return tuple(known[name] for name in self.graph.outputs)

    def follow_up(
        self, values: Mapping[str, torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Run what follows a step for those who ask. values: what it takes beside the step's outputs; outputs: what `run`, or a replay,
        returned."""
        call, kernel = self.graph.follow_up, self._follow_up_kernel
        if call is None or kernel is None:
            raise InvariantError("this step graph has nothing that could follow a step")
        known = {**values, **dict(zip(self.graph.outputs, outputs, strict=True))}
        found: tuple[torch.Tensor, ...] = kernel(*[known[name] for name, _ in call.inputs], *call.constants)
        return found


def _overload(name: str) -> OpOverload:
    """The operator of a name as str() tells it."""
    overload: OpOverload = operator.attrgetter(name)(torch.ops)
    return overload


@dataclass(frozen=True)
class _BoundCall:
    code: lower.RegionCode
    parameters: list[torch.Tensor]
    call: Call

    def run(self, values: dict[str, torch.Tensor]) -> None:
        results = self.code([*self.parameters, *[values[name] for name in self.call.inputs]])
        values.update(zip(self.call.outputs, results, strict=True))


# ----------------------------------------------------------------------------------------------------------- parameters


def make_parameters(recipes: Sequence[Recipe], loaded: dict[str, torch.Tensor]) -> dict[Recipe, torch.Tensor]:
    """Every recipe's tensor; `loaded` gives each source up after its last reader."""
    wanted = list(dict.fromkeys(recipes))
    num_readers = Counter(source for recipe in wanted for source in recipe.sources)
    made: dict[Recipe, torch.Tensor] = {}
    for recipe in wanted:
        made[recipe] = _make(recipe, loaded)
        for source in recipe.sources:
            num_readers[source] -= 1
            if not num_readers[source]:
                del loaded[source]
    loaded.clear()
    return made


def _make(recipe: Recipe, loaded: Mapping[str, torch.Tensor]) -> torch.Tensor:
    operands = [_joined([loaded[source] for source in operand]) for operand in recipe.operands]
    if recipe.packing is None:
        return operands[0]
    namespace, name = recipe.packing.split("::")
    packed: torch.Tensor = getattr(getattr(torch.ops, namespace), name)(*recipe.constants, *operands)
    return packed


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


# -------------------------------------------------------------------------------------------------------- late compiles

_COMPILE_EVENTS = "torch._dynamo.callback"


def _watch_compiles(on_compile: Callable[[object], None]) -> Callable[[], None]:
    """Call on_compile at every compile of torch's in this process; returns what ends the watch.

    A start from an artifact never imports the compiler, which takes seconds; then the watch begins when somebody does import it.
    """
    if _COMPILE_EVENTS in sys.modules:
        return _subscribe(sys.modules[_COMPILE_EVENTS], on_compile)
    finder = _OnImport(_COMPILE_EVENTS, lambda module: _subscribe(module, on_compile))
    sys.meta_path.insert(0, finder)
    return finder.cancel


def _subscribe(module: types.ModuleType, on_compile: Callable[[object], None]) -> Callable[[], None]:
    hooks = module.callback_handler
    hooks.register_start_callback(on_compile)
    return lambda: hooks.remove_start_callback(on_compile)


class _OnImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module once that is imported for the first time."""

    def __init__(self, name: str, then: Callable[[types.ModuleType], Callable[[], None]]):
        self._name, self._then = name, then
        self._undo: Callable[[], None] | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            raise InvariantError(f"{name} is gone: compiles after ready cannot be counted with this torch")
        loader, execute = spec.loader, spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self._undo = self._then(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def cancel(self) -> None:
        if self._undo is not None:
            self._undo()
        elif self in sys.meta_path:
            sys.meta_path.remove(self)
