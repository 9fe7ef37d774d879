"""The graph of one step, from token ids to sampled ids, as the compiler sees it (floor 4).

A step is one straight line of calls with no break and no decision by Python in between. Its repeated parts are *regions*: a
region's body is traced, optimised and compiled once, and called as often as the graph says, each time with other parameters (the
layers of a model are one region called num_layers times). So compile time does not grow with depth, pipeline stages are cuts between
calls, and every value that flows has a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from toka.compile.region_graph import RowSelection
from toka.placement import AxisPlacements


@dataclass(frozen=True)
class TensorSpec:
    """dtype, and shape in which a string names a symbolic size (the same string is the same size all over a region)."""

    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Region:
    """A body that is compiled once.

    module: its parameters and buffers are the region's parameters; forward(*inputs) returns a tuple of tensors. It may be on the meta
    device: only shapes and dtypes are looked at. inputs: (name, spec) in the order of forward's arguments. num_outputs: length of the
    tuple. Inputs may be written to only by operators whose schema says so. placements: where each parameter and buffer lives on a
    mesh, by its name; None = all replicate. selection: see RowSelection; None if all rows matter.
    """

    name: str
    module: nn.Module
    inputs: tuple[tuple[str, TensorSpec], ...]
    num_outputs: int
    placements: Mapping[str, AxisPlacements] | None = None
    selection: RowSelection | None = None

    def parameter_names(self) -> tuple[str, ...]:
        """Names of the parameters and buffers, in the order in which a call passes them."""
        return tuple(name for name, _ in self.parameters())

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.module.named_parameters(remove_duplicate=False)
        yield from self.module.named_buffers(remove_duplicate=False)


@dataclass(frozen=True)
class Call:
    """One use of a region.

    parameters: for each of the region's parameters the name of the model's tensor. inputs, outputs: names of values.
    """

    region: str
    parameters: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class OperatorCall:
    """One of toka's operators, called as it is, outside of what is compiled and captured: a region of its own would take as long to compile
    as a layer, for nothing. Its kernel is chosen with the others.

    inputs: (name, spec) of the tensors that it takes, outputs of the graph or given by the caller. constants: the arguments behind them.
    """

    op: str
    inputs: tuple[tuple[str, TensorSpec], ...]
    constants: tuple[int, ...]


@dataclass(frozen=True)
class StepGraph:
    """All regions and the calls in order. inputs: names that the caller binds, those of the follow-ups among them; outputs: names it gets
    back.

    follow_ups: run behind the steps in which somebody asks for them, each by itself; no two of one operator.
    """

    regions: tuple[Region, ...]
    calls: tuple[Call, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    follow_ups: tuple[OperatorCall, ...] = ()

    def __post_init__(self) -> None:
        regions = {region.name: region for region in self.regions}
        known = set(self.inputs)
        for call in self.calls:
            region = regions[call.region]
            if len(call.parameters) != len(region.parameter_names()) or len(call.inputs) != len(region.inputs):
                raise ValueError(f"a call of region {call.region} passes the wrong number of parameters or inputs")
            if missing := [name for name in call.inputs if name not in known]:
                raise ValueError(f"region {call.region} reads {missing[0]} before anything has written it")
            if len(call.outputs) != region.num_outputs:
                raise ValueError(
                    f"a call of region {call.region} names {len(call.outputs)} outputs of {region.num_outputs}"
                )
            known.update(call.outputs)
        if missing := [name for name in self.outputs if name not in known]:
            raise ValueError(f"nothing writes the output {missing[0]}")
