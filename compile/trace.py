"""From a region's module to a graph with symbolic sizes (floor 4)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from toka.compile.region_graph import Recipe, RegionGraph
from toka.compile.step_graph import Region, TensorSpec
from toka.errors import InvariantError

# Sizes that stand in for symbolic ones while tracing. They are larger than 1, since a size of 0 or 1 would be taken for a constant, and
# all different, so that two symbols are never taken for one.
_TRACE_SIZES = (13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59)


class _WithParametersAsInputs(nn.Module):
    """Calls a module with the parameters it is given, so that tracing sees them as inputs."""

    def __init__(self, region: Region):
        super().__init__()
        self._names = region.parameter_names()
        self._body = [region.module]  # in a list, so that it is no submodule: its own parameters must stay outside

    def forward(self, parameters: list[torch.Tensor], inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        outputs = torch.func.functional_call(
            self._body[0], dict(zip(self._names, parameters, strict=True)), tuple(inputs)
        )
        return tuple(outputs)


def trace(region: Region, device: torch.device) -> RegionGraph:
    """Trace one region with every symbolic size free from 1 up, without running anything or touching a parameter's data."""
    symbols = sorted({size for _, spec in region.inputs for size in spec.shape if isinstance(size, str)})
    sizes = dict(zip(symbols, _TRACE_SIZES, strict=False))
    if len(sizes) < len(symbols):
        raise ValueError(f"region {region.name} has more than {len(_TRACE_SIZES)} symbolic sizes")
    dims = {symbol: Dim(symbol, min=1) for symbol in symbols}
    with _fake_tensors():
        parameters = [torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for _, tensor in region.parameters()]
        inputs = [_example(spec, sizes, device) for _, spec in region.inputs]
    dynamic = [
        {i: dims[size] for i, size in enumerate(spec.shape) if isinstance(size, str)} for _, spec in region.inputs
    ]
    with torch.no_grad():
        program = torch.export.export(
            _WithParametersAsInputs(region),
            (parameters, inputs),
            dynamic_shapes=([None] * len(parameters), dynamic),
            strict=False,
        )
    return _flatten(region, program)


def _flatten(region: Region, program: ExportedProgram) -> RegionGraph:
    """The program's flat graph, with the region's own names on its placeholders and outputs as a plain tuple."""
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            raise InvariantError(f"region {region.name}: {spec.target} is a tensor hidden in the graph, not an input")
    inputs = tuple(name for name, _ in region.inputs)
    graph = RegionGraph(
        name=region.name,
        module=program.graph_module,
        recipes=[Recipe.joined(name) for name in region.parameter_names()],
        inputs=inputs,
        placements=region.placements or {name: {} for name in region.parameter_names()},
        selection=region.selection,
    )
    # The tracer took every size for 2 or more, to keep 0 and 1 from becoming constants; code is to be made for what was asked.
    for value in (node.meta["val"] for node in graph.placeholders):
        value.fake_mode.shape_env.var_to_range.update(program.range_constraints)
    for node, name in zip(graph.placeholders, (*region.parameter_names(), *inputs), strict=True):
        node._rename(name.replace(".", "_"))
        node.target = node.name
    [output] = [node for node in program.graph.nodes if node.op == "output"]
    output.args = (tuple(output.args[0]),)
    graph.module.recompile()
    return graph


@contextlib.contextmanager
def _fake_tensors() -> Iterator[None]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        yield


def _example(spec: TensorSpec, sizes: dict[str, int], device: torch.device) -> torch.Tensor:
    shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.empty(shape, dtype=spec.dtype, device=device)
