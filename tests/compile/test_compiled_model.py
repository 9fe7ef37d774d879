from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import toka.kernels.ops  # noqa: F401  (registers the operators)
from toka.compile import lower
from toka.compile.compiled_model import CompiledModel, CompileOptions
from toka.compile.step_graph import StepGraph
from toka.errors import ConfigError, LateCompileError

WIDTH = 8


def values(num_tokens: int) -> dict[str, torch.Tensor]:
    caches = {f"{kind}.{layer}": torch.zeros(4, 1, 8, WIDTH) for kind in ("key", "value") for layer in range(2)}
    return {"x": torch.randn(num_tokens, WIDTH), "slots": torch.arange(num_tokens, dtype=torch.int32), **caches}


def expected(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    outputs = []
    for weight in weights.values():
        x = torch.relu(x @ weight) + x
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("compiled", [True, False])
def test_one_region_serves_all_layers_at_every_size(graph: StepGraph, options: CompileOptions, compiled: bool) -> None:
    model = CompiledModel(graph, dataclasses.replace(options, compile=compiled))
    assert [built.name for built in model.build()] == ["block"]
    weights = {f"weight.{layer}": torch.randn(WIDTH, WIDTH) for layer in range(2)}
    model.bind(weights)
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


def test_a_second_build_compiles_nothing(
    graph: StepGraph, options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [built.cached for built in CompiledModel(graph, options).build()] == [False]
    monkeypatch.setattr(lower, "compile_to_file", lambda *args: pytest.fail("compiled again"))
    assert [built.cached for built in CompiledModel(graph, options).build()] == [True]


def test_the_key_of_a_graph_is_the_same_before_and_after_a_compile(
    graph: StepGraph, options: CompileOptions, tmp_path: Path
) -> None:
    CompiledModel(graph, options).build()
    elsewhere = dataclasses.replace(options, cache_path=tmp_path / "elsewhere")
    CompiledModel(graph, elsewhere).build()
    assert [path.name for path in sorted((options.cache_path / "compiled").iterdir())] == [
        path.name for path in sorted((elsewhere.cache_path / "compiled").iterdir())
    ]


def test_another_kernel_or_pass_is_another_artifact(graph: StepGraph, options: CompileOptions) -> None:
    CompiledModel(graph, options).build()
    changed = dataclasses.replace(options, kernels_fingerprint="other")
    assert [built.cached for built in CompiledModel(graph, changed).build()] == [False]


def test_compiles_after_freeze_are_counted(graph: StepGraph, options: CompileOptions) -> None:
    model = CompiledModel(graph, dataclasses.replace(options, compile=False))
    model.build()
    model.freeze()
    with pytest.raises(LateCompileError):
        model.build()
    assert model.compiles_after_freeze == 1
    torch.compile(lambda x: x.sin() + 1, backend="eager")(torch.ones(3))
    assert model.compiles_after_freeze == 2


def test_a_failing_compiler_is_one_clear_line(
    graph: StepGraph, options: CompileOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("something long\ng++: internal compiler error")

    monkeypatch.setattr(lower, "aoti_compile_and_package", fail)
    with pytest.raises(ConfigError, match=r"block.*internal compiler error.*torch_compile=F") as caught:
        CompiledModel(graph, options).build()
    assert "\n" not in str(caught.value)
    assert not list((options.cache_path / "compiled").iterdir())
