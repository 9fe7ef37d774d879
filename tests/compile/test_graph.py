from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toka.kernels.ops  # noqa: F401  (registers the operators)
from toka.compile import graph_spec
from toka.compile.compiled_model import CompileOptions
from toka.compile.pipeline import PassContext, run_passes
from toka.compile.step_graph import Call, Region, StepGraph, TensorSpec
from toka.compile.trace import trace
from toka.errors import InvariantError

CPU = torch.device("cpu")


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self._function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self._function(*inputs),)


def region_of(function: Callable[..., Tensor]) -> Region:
    return Region("test", Lambda(function), (("x", TensorSpec(torch.float32, ("T", 4))),), num_outputs=1)


def test_sizes_stay_symbolic_down_to_one(graph: StepGraph) -> None:
    program = trace(graph.regions[0], CPU).program
    ranges = [constraint.lower for constraint in program.range_constraints.values()]
    assert ranges and all(lower == 1 for lower in ranges)


def test_canonicalise_drops_what_takes_everything(options: CompileOptions) -> None:
    traced = trace(region_of(lambda x: x[:] * 2 + x[:, 1:].sum()), CPU)
    program = run_passes(traced, PassContext(options.choose_kernel, [])).program
    slices = [node for node in program.graph.nodes if node.target is torch.ops.aten.slice.Tensor]
    assert [node.args[2] for node in slices] == [1]
    x = torch.randn(5, 4)
    torch.testing.assert_close(program.graph_module(x)[0], x * 2 + x[:, 1:].sum())


def test_select_kernels_notes_each_choice_once(graph: StepGraph, options: CompileOptions) -> None:
    context = PassContext(options.choose_kernel, [])
    run_passes(trace(graph.regions[0], CPU), context)
    assert [(chosen.op, chosen.reason) for chosen in context.chosen] == [("write_kv", "reference")]


def test_a_host_sync_is_illegal() -> None:
    traced = trace(region_of(lambda x: x.masked_select(x > 0)), CPU)
    with pytest.raises(InvariantError, match=r"test after trace.*host wait"):
        graph_spec.verify(traced.program, "test", "trace")


def test_a_hidden_tensor_is_illegal() -> None:
    hidden = torch.randn(4)
    with pytest.raises(InvariantError, match="hidden in the graph"):
        graph_spec.verify(trace(region_of(lambda x: x + hidden), CPU).program, "test", "trace")


def test_a_graph_must_fit_together(graph: StepGraph) -> None:
    region = graph.regions[0]
    good = graph.calls[0]
    with pytest.raises(ValueError, match=r"reads nothing_wrote before"):
        StepGraph(
            (region,),
            (Call("block", good.parameters, ("nothing_wrote", *good.inputs[1:]), ("x",)),),
            graph.inputs,
            ("x",),
        )
    with pytest.raises(ValueError, match="number of parameters"):
        StepGraph((region,), (Call("block", (), good.inputs, ("x",)),), graph.inputs, ("x",))
    with pytest.raises(ValueError, match="nothing writes the output y"):
        StepGraph((region,), (good,), graph.inputs, ("y",))
