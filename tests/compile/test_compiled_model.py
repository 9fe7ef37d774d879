from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch

from toka.compile import builder
from toka.compile.artifact import Artifact
from toka.compile.compiled_model import CompiledModel, eager_regions, load_regions, make_parameters
from toka.compile.passes.select_kernels import ChosenKernel
from toka.compile.region_graph import Recipe
from toka.compile.step_graph import OperatorCall, StepGraph, TensorSpec
from toka.errors import InvariantError

WIDTH = 8
CPU = torch.device("cpu")


def reference_kernel(op: str, tensor: torch.Tensor) -> ChosenKernel:
    return ChosenKernel(op, getattr(torch.ops.toka, op).default, "reference")


def values(num_tokens: int) -> dict[str, torch.Tensor]:
    caches = {f"{kind}.{layer}": torch.zeros(4, 1, 8, WIDTH) for kind in ("key", "value") for layer in range(2)}
    return {"x": torch.randn(num_tokens, WIDTH), "slots": torch.arange(num_tokens, dtype=torch.int32), **caches}


def random_weights() -> dict[str, torch.Tensor]:
    return {f"weight.{layer}": torch.randn(WIDTH, WIDTH) for layer in range(2)}


def expected(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    outputs = []
    for weight in weights.values():
        x = torch.relu(x @ weight) + x
        outputs.append(x)
    return outputs


def eager_model(graph: StepGraph) -> CompiledModel:
    return CompiledModel(graph, eager_regions(builder.transform(graph, CPU, reference_kernel)[0]))


def test_a_follow_up_reads_what_the_step_gave_out(graph: StepGraph) -> None:
    x, ids = ("x", TensorSpec(torch.float32, ("T", WIDTH))), ("ids", TensorSpec(torch.int32, ("T",)))
    asking = dataclasses.replace(graph, follow_up=OperatorCall("token_logprobs", (x, ids), (2,)))
    regions, chosen = builder.transform(asking, CPU, reference_kernel)
    kernels = {each.op: str(each.overload) for each in chosen}
    assert kernels["token_logprobs"] == "toka.token_logprobs.default"
    model = CompiledModel(asking, eager_regions(regions), kernels)
    model.bind(random_weights())
    outputs = model.run(values(3))
    given = torch.tensor([0, 5, 7], dtype=torch.int32)
    found = model.follow_up({"ids": given}, outputs)
    for one, other in zip(found, torch.ops.toka.token_logprobs(outputs[0], given, 2), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InvariantError, match="nothing that could follow"):
        eager_model(graph).follow_up({}, outputs)


def assert_right_at_every_size(model: CompiledModel) -> None:
    weights = random_weights()
    model.bind(dict(weights))
    model.freeze()
    for num_tokens in (1, 2, 3, 7, 31):
        inputs = values(num_tokens)
        first, second = expected(inputs["x"], weights)
        (output,) = model.run(inputs)
        torch.testing.assert_close(output, second)
        written = inputs["key.1"].reshape(-1, WIDTH)
        torch.testing.assert_close(written[:num_tokens], second)
        assert not written[num_tokens:].any()
        torch.testing.assert_close(inputs["value.1"].reshape(-1, WIDTH)[:num_tokens], first)
    assert model.compiles_after_freeze == 0


def test_one_compiled_region_serves_all_layers_at_every_size(
    graph: StepGraph, build: Callable[[str], Artifact]
) -> None:
    artifact = build("made")
    assert [entry.name for entry in artifact.manifest.regions] == ["block"]
    assert_right_at_every_size(CompiledModel(graph, load_regions(artifact, CPU)))


def test_so_does_an_eager_one(graph: StepGraph) -> None:
    assert_right_at_every_size(eager_model(graph))


def test_binding_takes_the_tensors_over(graph: StepGraph) -> None:
    model, weights = eager_model(graph), random_weights()
    model.bind(weights)
    assert not weights and len(model.parameters) == 2


def test_parameters_are_joined_packed_and_shared() -> None:
    loaded = {"a": torch.ones(32, 4), "b": torch.zeros(32, 4), "c": torch.full((5, 4), 2.0), "unused": torch.ones(1)}
    joined, packed, plain = Recipe.joined("a", "b"), Recipe((("c",),), "toka::pack_linear"), Recipe.joined("c")
    made = make_parameters([joined, packed, plain, joined], loaded)
    torch.testing.assert_close(made[joined], torch.cat([torch.ones(32, 4), torch.zeros(32, 4)]))
    torch.testing.assert_close(made[packed], torch.ops.toka.pack_linear(torch.full((5, 4), 2.0)))
    assert made[plain].shape == (5, 4) and len(made) == 3 and not loaded


def test_compiles_after_freeze_are_counted(graph: StepGraph) -> None:
    model = eager_model(graph)
    model.bind(random_weights())
    torch.compile(lambda x: x * 2, backend="eager")(torch.ones(3))
    model.freeze()
    assert model.compiles_after_freeze == 0
    torch.compile(lambda x: x * 3, backend="eager")(torch.ones(3))
    assert model.compiles_after_freeze == 1


def test_a_model_that_is_gone_hears_nothing(graph: StepGraph) -> None:
    hooks = torch._dynamo.callback.callback_handler
    before = len(_callbacks(hooks))
    model = eager_model(graph)
    model.bind(random_weights())
    model.freeze()
    assert len(_callbacks(hooks)) == before + 1
    del model
    assert len(_callbacks(hooks)) == before


def _callbacks(hooks: object) -> list[object]:
    return next(value for name, value in vars(hooks).items() if "start_callbacks" in name)


def test_a_compiler_that_is_imported_later_is_watched_too() -> None:
    """In a process of its own, since this one has imported the compiler already."""
    script = """
        import sys, torch
        from toka.compile.compiled_model import _watch_compiles
        assert "torch._dynamo" not in sys.modules
        seen = []
        stop = _watch_compiles(seen.append)
        torch.compile(lambda x: x * 2, backend="eager")(torch.ones(3))
        assert len(seen) == 1, seen
        stop()
        torch.compile(lambda x: x * 3, backend="eager")(torch.ones(3))
        assert len(seen) == 1, seen
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_warming_runs_each_region_once(graph: StepGraph, num_tokens: int) -> None:
    model = eager_model(graph)
    model.bind(random_weights())
    inputs = values(num_tokens)
    model.warm(inputs)
    assert inputs["key.0"].any() and not inputs["key.1"].any()
