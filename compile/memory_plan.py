"""How much memory a step allocates, told from its graphs without running it (floor 4).

The compiler (inductor, ahead of time) turns a region's graph into a list of kernels that run one after the other, each with buffers
that are allocated before it and freed after their last reader. This module walks the graph by the same rules and adds up:

- An operator that the compiler does not write itself (matrix products, `toka*` operators, whatever is neither pointwise, a view, a
  gather, a reduction nor a concatenation) is a kernel: what it reads and returns are buffers.
- A pointwise value or a gather is computed inside its readers and takes nothing, unless it must be a buffer: since the region returns
  it, since such a kernel reads it, or since it has several readers and is dear to compute again (over MAX_INLINE_READS buffers read, or on
  CPU an exponential). It is then computed just before the first reader that needs it.
- A reduction is a buffer, and so is a concatenation, whose parts are computed in place.
- A view takes nothing and keeps what it looks at alive.
- A pointwise kernel writes over a buffer of its result's size and dtype that it is the last to read. Any other buffer is freed after its
  last reader: where the compiler holds on to one for later use, it sees to it that the peak stays what it was.
- Buffers that a region returns live until the step overwrites their name (`CompiledModel.run`): the previous layer's hidden states stay
  while the next layer runs, rope angles and slots to the end of the step. Parameters and the caller's inputs are not counted.
- Kernels may run in another order than the graph's: the compiler takes the order with the lowest peak out of three, and so does this.

What an operator allocates by itself through PyTorch's allocator while it runs is declared in WORKSPACES. Memory that does not come from
that allocator (scratch of C++ kernels and of MKL, thread stacks) is not predicted: the warmup measures it.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node

from toka.compile.region_graph import Recipe, RegionGraph
from toka.compile.step_graph import OperatorCall, Region, StepGraph, TensorSpec

MAX_INLINE_READS = 4  # torch._inductor.config.realize_reads_threshold


@dataclass(frozen=True)
class SizedTensor:
    """A tensor of a graph with its symbolic sizes replaced by numbers."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


# Bytes that one call of an operator takes for itself while it runs, from the tensors that it is given and those that it returns.
Workspace = Callable[[Sequence[SizedTensor], Sequence[SizedTensor]], int]


def _states_of_splits(given: Sequence[SizedTensor], returned: Sequence[SizedTensor]) -> int:
    """Decode attention keeps a state for each part that a row's keys are cut into. Without a window, which would cut fewer."""
    from toka.kernels.triton import attention_states, attention_tile  # import Triton, which takes its time

    query, keys, values, table, rows, starts, lens, *shared = (
        torch.empty(each.shape, dtype=each.dtype, device="meta") for each in given
    )
    problem = attention_tile.Problem(query, keys, values, table, rows, starts, lens, 1.0, 0, *shared)
    return attention_states.states_of(problem, torch.device("meta")).num_bytes


def _lists_of_the_sampler(given: Sequence[SizedTensor], returned: Sequence[SizedTensor]) -> int:
    from toka.kernels.triton import sample

    return sample.workspace_bytes(*given[0].shape)


def _candidates_of_logprobs(given: Sequence[SizedTensor], returned: Sequence[SizedTensor]) -> int:
    from toka.kernels.triton import token_logprobs

    num_places, vocab_size = given[0].shape
    return token_logprobs.workspace_bytes(num_places, vocab_size, returned[2].shape[1])


# (device type, operator) → its workspace. Operators that are not listed take nothing.
WORKSPACES: Mapping[tuple[str, str], Workspace] = {
    ("cuda", "toka_triton::paged_attention"): _states_of_splits,
    ("cuda", "toka_triton::sample"): _lists_of_the_sampler,
    ("cuda", "toka_triton::token_logprobs"): _candidates_of_logprobs,
}


@dataclass(frozen=True)
class RegionMemory:
    """Bytes of one call. peak: of what the region allocates, outputs included. outputs: of each one; 0 if it is an input's memory.

    num_kernels: that one call runs, about: pointwise work that the compiler joins to a reduction counts twice.
    """

    peak: int
    outputs: tuple[int, ...]
    num_kernels: int


@dataclass(frozen=True)
class StepActivations:
    """Bytes of a whole step. peak: at its highest. largest_region: the region that runs then. regions: each by itself."""

    peak: int
    largest_region: str
    regions: Mapping[str, RegionMemory]


def step_activations(
    graph: StepGraph,
    modules: Mapping[str, GraphModule],
    sizes: Mapping[str, int],
    device: str,
    workspaces: Mapping[tuple[str, str], Workspace] = WORKSPACES,
) -> StepActivations:
    """The highest sum of bytes of tensors that a step of these sizes allocates.

    modules: each region's graph after all passes (a flat graph whose last placeholders are the region's inputs). sizes: a number for every
    symbolic size of the regions' inputs ("T", "R", ...). device: type of the device that the kernels were chosen for.
    """
    regions = {
        region.name: region_memory(region, modules[region.name], sizes, device, workspaces) for region in graph.regions
    }
    alive: dict[str, int] = {}
    peak, largest = 0, graph.calls[0].region
    for call in graph.calls:
        during = sum(alive.values()) + regions[call.region].peak
        if during > peak:
            peak, largest = during, call.region
        alive.update(zip(call.outputs, regions[call.region].outputs, strict=True))
    if graph.follow_up is not None:  # it runs when all but the outputs is gone
        during = sum(alive.get(name, 0) for name in graph.outputs)
        during += operator_bytes(graph.follow_up, sizes, device, workspaces)
        if during > peak:
            peak, largest = during, graph.follow_up.op
    return StepActivations(peak, largest, regions)


def operator_bytes(
    call: OperatorCall, sizes: Mapping[str, int], device: str, workspaces: Mapping[tuple[str, str], Workspace]
) -> int:
    """What the operator returns and takes for itself, and the inputs that are not the graph's (all but the first)."""

    def meta(spec: TensorSpec) -> torch.Tensor:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        return torch.empty(shape, dtype=spec.dtype, device="meta")

    given = [meta(spec) for _, spec in call.inputs]
    with FakeTensorMode(allow_non_fake_inputs=True):
        returned = getattr(torch.ops.toka, call.op)(*given, *call.constants)
    workspace = 0
    for (on, name), rule in workspaces.items():
        if on == device and name.partition("::")[2] == call.op:
            workspace = rule(
                *([SizedTensor(tuple(t.shape), t.dtype) for t in tensors] for tensors in (given, returned))
            )
    held: int = sum(tensor.nbytes for tensor in (*given[1:], *returned))
    return workspace + held


def region_memory(
    region: Region,
    module: GraphModule,
    sizes: Mapping[str, int],
    device: str,
    workspaces: Mapping[tuple[str, str], Workspace] = WORKSPACES,
) -> RegionMemory:
    """What one call of a region allocates; arguments as those of `step_activations`."""
    kernels, outputs = _Kernels(module, _Sizes(region, module, sizes), device, workspaces).build()
    peak = min(_peak_bytes(order, outputs) for order in _orders(kernels))
    returned = tuple(0 if buffer is None else buffer.num_bytes for buffer in outputs)
    return RegionMemory(peak, returned, len(kernels))


def parameter_bytes(graph: StepGraph, transformed: Sequence[RegionGraph]) -> int:
    """Bytes of the tensors that the calls' code takes as parameters, joined and packed as their recipes say; each counted once.

    transformed: every region after all passes.
    """
    regions = {region.name: region for region in graph.regions}
    by_name = {region.name: region for region in transformed}
    sizes: dict[Recipe, int] = {}
    for call in graph.calls:
        names = dict(zip(regions[call.region].parameter_names(), call.parameters, strict=True))
        region = by_name[call.region]
        for recipe, node in zip(region.recipes, region.placeholders, strict=False):
            sizes[recipe.renamed(names)] = node.meta["val"].numel() * node.meta["val"].element_size()
    return sum(sizes.values())


# --------------------------------------------------------------------------------------------------------- sizes and buffers


@dataclass(frozen=True, eq=False)
class _Buffer:
    """name: for people. kind: dtype and symbolic number of elements; buffers of one kind can stand in for each other."""

    name: str
    num_bytes: int
    kind: tuple[torch.dtype, str]


@dataclass(eq=False)
class _Kernel:
    """reads: buffers that it needs (inputs of the region are none). writes: buffers that begin with it. workspace: bytes while it runs.

    in_place: whether it may write over what it reads.
    """

    name: str
    reads: tuple[_Buffer, ...]
    writes: tuple[_Buffer, ...]
    in_place: bool
    workspace: int = 0


class _Sizes:
    """Turns symbolic sizes of a region's graph into numbers."""

    def __init__(self, region: Region, module: GraphModule, sizes: Mapping[str, int]):
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        self._values: dict[sympy.Expr, int] = {}
        for node, (_, spec) in zip(placeholders[-len(region.inputs) :], region.inputs, strict=True):
            for traced, size in zip(node.meta["val"].shape, spec.shape, strict=True):
                if isinstance(size, str) and isinstance(traced, torch.SymInt):
                    self._values[traced.node.expr] = sizes[size]

    def number(self, size: int | torch.SymInt) -> int:
        return int(size.node.expr.xreplace(self._values)) if isinstance(size, torch.SymInt) else int(size)

    def sized(self, tensor: torch.Tensor) -> SizedTensor:
        return SizedTensor(tuple(self.number(size) for size in tensor.shape), tensor.dtype)

    def buffer(self, name: str, tensor: torch.Tensor) -> _Buffer:
        numel = tensor.numel()
        expression = str(numel.node.expr if isinstance(numel, torch.SymInt) else numel)
        return _Buffer(name, self.number(numel) * tensor.element_size(), (tensor.dtype, expression))


# ------------------------------------------------------------------------------------------------------- graph to kernels

_ATEN = torch.ops.aten
_GATHERS = {_ATEN.index.Tensor, _ATEN.embedding.default, _ATEN.gather.default, _ATEN.index_select.default}
_CREATIONS = {
    _ATEN.arange.default, _ATEN.arange.start, _ATEN.arange.start_step, _ATEN.full.default, _ATEN.zeros.default,
    _ATEN.ones.default, _ATEN.scalar_tensor.default, _ATEN.full_like.default, _ATEN.zeros_like.default,
}  # fmt: skip
_COPIES = {_ATEN.clone.default, _ATEN._to_copy.default, _ATEN.to.dtype, _ATEN.contiguous.default}
_CONCATENATIONS = {_ATEN.cat.default, _ATEN.stack.default}
_REDUCTIONS = {
    _ATEN.mean.dim, _ATEN.mean.default, _ATEN.sum.dim_IntList, _ATEN.sum.default, _ATEN.amax.default, _ATEN.amin.default,
    _ATEN.argmax.default, _ATEN.argmin.default, _ATEN.any.dim, _ATEN.all.dim, _ATEN.prod.dim_int, _ATEN.logsumexp.default,
}  # fmt: skip
_DEAR_ON_CPU = {"exp", "sigmoid", "silu"}  # contain what inductor calls heavy: exp and sigmoid


@dataclass
class _Value:
    """A node's result: either a buffer or a view of one, or (buffer None) computed in its readers from `reads`.

    is_input: memory of the caller. in_place: every element depends on the same place of what it reads only.
    """

    reads: tuple[_Buffer, ...] = ()
    buffer: _Buffer | None = None
    is_input: bool = False
    in_place: bool = True
    source: Node | None = None


@dataclass
class _Kernels:
    """Reads a graph into kernels; `build` once."""

    module: GraphModule
    sizes: _Sizes
    device: str
    workspaces: Mapping[tuple[str, str], Workspace]
    _values: dict[Node, _Value] = field(default_factory=dict)
    _kernels: list[_Kernel] = field(default_factory=list)

    def build(self) -> tuple[list[_Kernel], list[_Buffer | None]]:
        """The kernels in the graph's order, and the buffer of each output (None for an input's memory)."""
        for node in self.module.graph.nodes:
            if node.op == "call_function":
                self._read(node)
            elif node.op == "output":
                return self._kernels, [self._materialise(each) for each in node.args[0]]
        raise ValueError("the graph has no output")

    def _read(self, node: Node) -> None:
        target = node.target
        tensors = _tensor_arguments(node)
        if target is operator.getitem or (isinstance(target, OpOverload) and _is_view(node, target)):
            if node not in self._values:
                self._values[node] = self._value(tensors[0])
        elif not isinstance(target, OpOverload):
            return  # arithmetic on sizes
        elif target in _REDUCTIONS:
            self._run(node, self._reads(tensors), in_place=False)
        elif target in _CONCATENATIONS:
            self._values[node] = _Value(self._reads(tensors), in_place=False, source=node)
            self._materialise(node)
        elif _is_pointwise(target):
            self._inline(node, tensors)
        else:
            for tensor in tensors:
                self._materialise(tensor)
            self._run(node, self._reads(tensors), in_place=False)

    def _value(self, node: Node) -> _Value:
        return self._values.get(node, _Value(is_input=True))

    def _reads(self, nodes: Iterable[Node]) -> tuple[_Buffer, ...]:
        found: dict[_Buffer, None] = {}
        for node in nodes:
            value = self._value(node)
            found.update(dict.fromkeys(value.reads if value.buffer is None else (value.buffer,)))
        return tuple(found)

    def _inline(self, node: Node, tensors: list[Node]) -> None:
        in_place = node.target not in _GATHERS and all(
            self._value(tensor).in_place for tensor in tensors if self._value(tensor).buffer is None
        )
        value = _Value(self._reads(tensors), in_place=in_place, source=node)
        self._values[node] = value
        num_inputs = sum(self._value(tensor).is_input for tensor in tensors)
        dear = isinstance(node.target, OpOverload) and node.target._schema.name.removeprefix("aten::") in _DEAR_ON_CPU
        dear = dear and self.device == "cpu"
        if len(node.users) > 1 and (dear or len(value.reads) + num_inputs > MAX_INLINE_READS):
            self._materialise(node)

    def _materialise(self, node: Node) -> _Buffer | None:
        """Make sure that a value is a buffer (computing it now if it isn't) and return that; None for the caller's memory."""
        value = self._value(node)
        if value.buffer is None and not value.is_input:
            assert value.source is not None
            value.buffer = self._run(value.source, value.reads, value.in_place)[0]
            self._values[value.source].buffer = value.buffer
        return value.buffer

    def _run(self, node: Node, reads: tuple[_Buffer, ...], in_place: bool) -> tuple[_Buffer, ...]:
        """Add the kernel that computes a node; its tensors become buffers."""
        result = node.meta.get("val")
        tensors = (
            [result] if isinstance(result, torch.Tensor) else [t for t in result or () if isinstance(t, torch.Tensor)]
        )
        writes = tuple(self.sizes.buffer(f"{node.name}.{i}", tensor) for i, tensor in enumerate(tensors))
        self._kernels.append(_Kernel(node.name, reads, writes, in_place, self._workspace(node, tensors)))
        if isinstance(result, torch.Tensor):
            value = self._values.setdefault(node, _Value())
            value.buffer, value.source = writes[0], node
        else:
            for user in node.users:
                if user.target is operator.getitem:
                    self._values[user] = _Value(buffer=writes[int(str(user.args[1]))], source=user)
        return writes

    def _workspace(self, node: Node, returned: Sequence[torch.Tensor]) -> int:
        assert isinstance(node.target, OpOverload)
        rule = self.workspaces.get((self.device, node.target._schema.name))
        if rule is None:
            return 0
        given = [self.sizes.sized(each.meta["val"]) for each in _tensor_arguments(node)]
        return rule(given, [self.sizes.sized(tensor) for tensor in returned])


def _tensor_arguments(node: Node) -> list[Node]:
    return [each for each in node.all_input_nodes if not isinstance(each.meta.get("val"), torch.SymInt | int | float)]


def _is_view(node: Node, target: OpOverload) -> bool:
    """Whether the result shares its argument's memory: its schema says so, and no dtype changes."""
    returns = [each.alias_info for each in target._schema.returns]
    if not returns or any(info is None or info.is_write for info in returns):
        return False
    first = _tensor_arguments(node)[0].meta["val"]
    result = node.meta["val"]
    return not isinstance(result, torch.Tensor) or result.dtype == first.dtype


def _is_pointwise(target: OpOverload) -> bool:
    return torch.Tag.pointwise in target.tags or target in _GATHERS or target in _CREATIONS or target in _COPIES


# ------------------------------------------------------------------------------------------------------ kernels to a peak


def _orders(kernels: list[_Kernel]) -> list[list[_Kernel]]:
    """The orders that the compiler tries: the graph's, depth first, and whichever kernel that is ready adds least."""
    return [kernels, _depth_first(kernels), _least_memory_first(kernels)]


def _depth_first(kernels: list[_Kernel]) -> list[_Kernel]:
    """Each kernel just after those it needs, the latest kernels of the graph asking first."""
    writer = {buffer: kernel for kernel in kernels for buffer in kernel.writes}
    ordered: dict[_Kernel, None] = {}

    def visit(kernel: _Kernel) -> None:
        if kernel not in ordered:
            for buffer in kernel.reads:
                visit(writer[buffer])
            ordered[kernel] = None

    for kernel in kernels:
        if not kernel.writes or kernel is kernels[-1]:  # those that only write to the caller's memory, and the end
            visit(kernel)
    for kernel in kernels:
        visit(kernel)
    return list(ordered)


def _least_memory_first(kernels: list[_Kernel]) -> list[_Kernel]:
    """Of the kernels that are ready, the one that leaves the fewest bytes alive goes next."""
    readers_left: dict[_Buffer, int] = defaultdict(int)
    for kernel in kernels:
        for buffer in kernel.reads:
            readers_left[buffer] += 1
    waiting, ordered = list(kernels), list[_Kernel]()
    unwritten = {buffer for kernel in kernels for buffer in kernel.writes}

    def growth(kernel: _Kernel) -> int:
        freed = sum(buffer.num_bytes for buffer in kernel.reads if readers_left[buffer] == 1)
        return sum(buffer.num_bytes for buffer in kernel.writes) - freed

    while waiting:
        ready = [kernel for kernel in waiting if not unwritten.intersection(kernel.reads)]
        best = min(ready, key=growth)  # the first of equals: the graph's order
        waiting.remove(best)
        unwritten.difference_update(best.writes)
        for buffer in best.reads:
            readers_left[buffer] -= 1
        ordered.append(best)
    return ordered


def _peak_bytes(kernels: list[_Kernel], outputs: Sequence[_Buffer | None]) -> int:
    """Bytes alive at the worst moment when the kernels run in this order."""
    last_read: dict[_Buffer, int] = {}
    for position, kernel in enumerate(kernels):
        last_read.update(dict.fromkeys((*kernel.writes, *kernel.reads), position))
    last_read.update((buffer, len(kernels)) for buffer in outputs if buffer is not None)
    alive = peak = 0
    for position, kernel in enumerate(kernels):
        dying = [buffer for buffer in kernel.reads if last_read[buffer] == position]
        for buffer in kernel.writes:
            alive += buffer.num_bytes
            if kernel.in_place and (overwritten := [each for each in dying if each.kind == buffer.kind]):
                dying.remove(overwritten[0])
                alive -= buffer.num_bytes
        peak = max(peak, alive + kernel.workspace)
        dying += [buffer for buffer in kernel.writes if last_read[buffer] == position]
        alive -= sum(buffer.num_bytes for buffer in dying)
    return peak
