from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import toka.kernels.ops  # noqa: F401  (registers the operators)
from toka.compile import graph_spec
from toka.compile.passes.select_kernels import ChosenKernel
from toka.compile.pipeline import PASSES, PassContext, run_passes
from toka.compile.region_graph import Recipe
from toka.compile.step_graph import Call, Region, StepGraph, TensorSpec
from toka.compile.trace import trace
from toka.errors import InvariantError
from toka.placement import Shard

CPU = torch.device("cpu")


class Lambda(nn.Module):
    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self._function = function

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        return (self._function(*inputs),)


def region_of(function: Callable[..., Tensor]) -> Region:
    return Region("test", Lambda(function), (("x", TensorSpec(torch.float32, ("T", 4))),), num_outputs=1)


def reference_kernel(op: str, tensor: Tensor) -> ChosenKernel:
    return ChosenKernel(op, getattr(torch.ops.toka, op).default, "reference")


def test_sizes_stay_symbolic_down_to_one(graph: StepGraph) -> None:
    traced = trace(graph.regions[0], CPU)
    sizes = [traced.input_node(name).meta["val"].shape[0].node for name in ("x", "key_cache", "value_cache", "slots")]
    assert all(size.shape_env.var_to_range[size.expr].lower == 1 for size in sizes)
    assert sizes[0].expr == sizes[3].expr != sizes[1].expr == sizes[2].expr


def test_placeholders_carry_the_regions_own_names(graph: StepGraph) -> None:
    traced = trace(graph.regions[0], CPU)
    assert [node.name for node in traced.placeholders] == ["weight", "x", "key_cache", "value_cache", "slots"]
    assert traced.recipes == [Recipe.joined("weight")] and traced.placements == {"weight": {}}


def test_canonicalise_drops_what_computes_nothing() -> None:
    traced = trace(region_of(lambda x: x[:].float() * 2 + x[:, 1:].sum()), CPU)
    graph = run_passes(traced, PassContext(reference_kernel)).module.graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets == ["aten.mul.Tensor", "aten.slice.Tensor", "aten.sum.default", "aten.add.Tensor"]
    x = torch.randn(5, 4)
    torch.testing.assert_close(traced.module(x)[0], x * 2 + x[:, 1:].sum())


def test_select_kernels_notes_each_choice_once(graph: StepGraph) -> None:
    context = PassContext(reference_kernel)
    run_passes(trace(graph.regions[0], CPU), context)
    assert [(chosen.op, chosen.reason) for chosen in context.chosen] == [("write_kv", "reference")]


def test_every_pass_is_heard_of(graph: StepGraph) -> None:
    heard: list[tuple[int, str]] = []
    context = PassContext(reference_kernel, on_graph=lambda index, name, graph: heard.append((index, name)))
    run_passes(trace(graph.regions[0], CPU), context)
    assert [name for _, name in heard] == ["trace", *(each.name for each in PASSES)]


def test_a_host_sync_is_illegal() -> None:
    traced = trace(region_of(lambda x: x.masked_select(x > 0)), CPU)
    with pytest.raises(InvariantError, match=r"test after trace.*host wait"):
        graph_spec.verify(traced, "trace")


def test_a_hidden_tensor_is_illegal() -> None:
    hidden = torch.randn(4)
    with pytest.raises(InvariantError, match="hidden in the graph"):
        trace(region_of(lambda x: x + hidden), CPU)


def test_a_node_without_a_fake_value_is_illegal() -> None:
    traced = trace(region_of(lambda x: x + 1), CPU)
    [add] = [node for node in traced.module.graph.nodes if node.op == "call_function"]
    del add.meta["val"]
    with pytest.raises(InvariantError, match="no fake value"):
        graph_spec.verify(traced, "some pass")


def test_a_parameter_needs_placements_and_joined_ones_the_same(graph: StepGraph) -> None:
    traced = trace(graph.regions[0], CPU)
    traced.placements = {}
    with pytest.raises(InvariantError, match="parameter weight has no placements"):
        graph_spec.verify(traced, "trace")
    traced.placements = {"weight": {"tp": Shard(0)}, "other": {}}
    traced.recipes = [Recipe.joined("weight", "other")]
    with pytest.raises(InvariantError, match="different placements are joined: weight, other"):
        graph_spec.verify(traced, "trace")


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
