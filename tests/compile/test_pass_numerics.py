"""Every pass against the graph that it was given: same values, same writes into the cache, within the tolerance it states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from toka.compile.compiled_model import make_parameters
from toka.compile.passes.select_kernels import ChosenKernel
from toka.compile.pipeline import PASSES, PassContext
from toka.compile.region_graph import RegionGraph
from toka.compile.step_graph import Region
from toka.compile.trace import trace
from toka.models.registry import build_model
from toka.models.spec import read_spec
from toka.runner.step_program import build_step_graph
from toka.weights.formats import FormatPlan
from toka.weights.round_to_nearest import RoundToNearest
from toka.weights.weight import DENSE

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS, MAX_ROWS = 8, 16, 6
LENS = (5, 1, 9)  # new tokens of each row; the second continues a cached prefix
CACHED = (0, 7, 0)
NUM_PADDED_TOKENS, NUM_PADDED_ROWS, SAMPLED = 2, 1, (0, 2)  # the rows whose successor is drawn; one padded sample
SCORED = (6, 8)  # tokens of the last row that are scored beside; no successor of theirs is drawn
NUM_SAMPLES = len(SAMPLED) + len(SCORED)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 24},
}
# Of integer codes; float activations, since rounding them to int8 would make a step of what passes change by a rounding.
FORMATS = {
    "dense": DENSE,
    "int4": RoundToNearest("int4", 4, 16, has_minimums=True, int8_activations=False),
    "int8": RoundToNearest("int8", 8, 0, has_minimums=False, int8_activations=False),
}


def regions_of(family: str, format: str = "dense") -> dict[str, Region]:
    fields = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 70,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        **MODELS[family],
    }
    model = build_model(read_spec(fields, None), torch.float32)
    FormatPlan(lambda name: FORMATS[format]).apply(model)
    return {region.name: region for region in build_step_graph(model, torch.float32, BLOCK_SIZE).regions}


def packing_kernel(op: str, tensor: Tensor) -> ChosenKernel:
    """Reference kernels everywhere, with the weights packed as the fast ones want them."""
    if op in ("linear", "embedding", "linear_quantised", "embedding_quantised"):
        packing = "toka::pack_quantised" if op.endswith("quantised") else "toka::pack_linear"
        return ChosenKernel(op, getattr(torch.ops.toka, f"{op}_packed").default, "test", packing)
    return ChosenKernel(op, getattr(torch.ops.toka, op).default, "test")


def parameters_of(region: Region) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)

    def values(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.uint8:
            return torch.randint(256, tensor.shape, generator=random, dtype=torch.uint8)
        return (torch.randn(tensor.shape, generator=random) * 0.2).to(tensor.dtype)

    return {name: values(tensor) for name, tensor in region.parameters()}


def inputs_of(region: Region) -> dict[str, Tensor]:
    """A mixed step: prefill and decode rows, padding in tokens, rows and samples."""
    random = torch.Generator().manual_seed(2)
    starts = torch.tensor([0, *LENS]).cumsum(0).to(torch.int32)
    num_tokens = int(starts[-1])
    positions = torch.cat([torch.arange(new) + old for new, old in zip(LENS, CACHED, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(LENS)), torch.tensor(LENS))
    table = torch.arange(MAX_ROWS * 2, dtype=torch.int32).view(MAX_ROWS, 2)
    slots = table[rows, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    seq_lens = torch.tensor(LENS) + torch.tensor(CACHED)
    sampled = torch.tensor(SAMPLED)

    def padded(values: Tensor, padding: int, count: int) -> Tensor:
        return torch.cat([values.to(torch.int32), torch.full((count,), padding, dtype=torch.int32)])

    known = {
        "token_ids": torch.randint(0, 70, (num_tokens + NUM_PADDED_TOKENS,), dtype=torch.int32, generator=random),
        "token_rows": padded(rows, -1, NUM_PADDED_TOKENS),
        "positions": padded(positions, 0, NUM_PADDED_TOKENS),
        "slots": padded(slots, -1, NUM_PADDED_TOKENS),
        "block_table": table,
        "rows": padded(torch.arange(len(LENS)), -1, NUM_PADDED_ROWS),
        "query_start": padded(starts, num_tokens, NUM_PADDED_ROWS),
        "seq_lens": padded(seq_lens, 0, NUM_PADDED_ROWS),
        "shared_groups": torch.zeros(1, 5, dtype=torch.int32),
        "shared_members": torch.zeros(1, dtype=torch.int32),
        "shared_lens": torch.zeros(MAX_ROWS, dtype=torch.int32),
        "sample_index": padded(index := torch.cat([starts[1:][sampled] - 1, torch.tensor(SCORED)]), 0, 1),
        "sample_rows": padded(rows[index], -1, 1),
        "sample_query_start": padded(torch.arange(NUM_SAMPLES + 1), NUM_SAMPLES, 1),
        "sample_seq_lens": padded(positions[index] + 1, 0, 1),
        "draw_rows": padded(sampled, -1, 1 + len(SCORED)),
        "last_token": torch.zeros(MAX_ROWS, dtype=torch.int32),
        "temperature": torch.zeros(MAX_ROWS),
        "top_k": torch.zeros(MAX_ROWS, dtype=torch.int32),
        "top_p": torch.ones(MAX_ROWS),
        "min_p": torch.zeros(MAX_ROWS),
        "seed": torch.zeros(MAX_ROWS, dtype=torch.int64),
        "held_back_ids": torch.full((MAX_ROWS, 16), -1, dtype=torch.int32),
        "held_back_until": torch.zeros(MAX_ROWS, dtype=torch.int32),
    }
    made = {}
    for name, spec in region.inputs:
        sizes = {"T": num_tokens + NUM_PADDED_TOKENS, "B": NUM_BLOCKS, "S": NUM_SAMPLES + 1}
        shape = [sizes.get(str(size), size) for size in spec.shape]
        made[name] = known[name] if name in known else torch.randn(shape, generator=random)  # type: ignore[arg-type]
    return made


def run(graph: RegionGraph, region: Region) -> list[Tensor]:
    """The outputs, and every input that may have been written to."""
    inputs = {name: value.clone() for name, value in inputs_of(region).items()}
    made = make_parameters(graph.recipes, parameters_of(region))
    outputs = graph.module(*[made[recipe] for recipe in graph.recipes], *inputs.values())
    written = [inputs[name] for name in ("key_cache", "value_cache", "last_token") if name in inputs]
    return [*outputs, *written]


@pytest.mark.parametrize(
    ("family", "format"), [*((each, "dense") for each in MODELS), ("qwen2", "int4"), ("llama", "int8")]
)
@pytest.mark.parametrize("name", ["begin", "layer_full", "last"])
def test_each_pass_keeps_its_promise(family: str, format: str, name: str) -> None:
    region = regions_of(family, format)[name]
    graph, context = trace(region, CPU), PassContext(packing_kernel)
    before = run(graph, region)
    for each in PASSES:
        graph = each.run(graph, context)
        after = run(graph, region)
        for expected, found in zip(before, after, strict=True):
            assert found.shape == expected.shape and found.dtype == expected.dtype
            padded = {sum(LENS) + NUM_PADDED_TOKENS: sum(LENS), NUM_SAMPLES + 1: NUM_SAMPLES}
            real = expected[: padded.get(len(expected), len(expected))].double()
            difference = (found[: len(real)].double() - real).abs().max()
            assert difference <= each.tolerance * real.abs().max(), f"{each.name}: off by {difference:.2e}"
        before = after


def count(graph: RegionGraph, name: str) -> int:
    return sum(name in str(node.target) for node in graph.module.graph.nodes)


def transformed(family: str, name: str, format: str = "dense") -> tuple[RegionGraph, RegionGraph]:
    """Before and after all passes."""
    traced = trace(regions_of(family, format)[name], CPU)
    graph = copy.deepcopy(traced)
    context = PassContext(packing_kernel)
    for each in PASSES:
        graph = each.run(graph, context)
    return traced, graph


@pytest.mark.parametrize("family", MODELS)
def test_a_layer_has_four_products_and_one_write(family: str) -> None:
    before, after = transformed(family, "layer_full")
    assert (count(before, "aten.linear"), count(after, "linear_packed")) == (7, 4)
    assert (count(before, "write_kv"), count(after, "rope_write_kv"), count(after, "write_kv")) == (1, 1, 1)
    joined = [recipe.sources for recipe in after.recipes if len(recipe.sources) > 1]
    short = [
        tuple(source.split(".")[2] for source in sources)
        for sources in joined
        if sources[0].endswith("dense") and "weight" in sources[0]
    ]
    assert sorted(short) == [("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")]


def test_products_of_codes_are_joined_and_packed_too() -> None:
    _, after = transformed("llama", "layer_full", "int4")
    assert count(after, "linear_quantised_packed") == 4
    packed = [recipe for recipe in after.recipes if recipe.packing is not None]
    assert len(packed) == 4 and all(recipe.constants == (4,) for recipe in packed)
    widths = sorted(tuple(map(len, recipe.operands)) for recipe in packed)  # codes, scales, minimums of so many weights
    assert widths == [(1, 1, 1), (1, 1, 1), (2, 2, 2), (3, 3, 3)]


@pytest.mark.parametrize("format", ["dense", "int4"])
@pytest.mark.parametrize("family", MODELS)
def test_nothing_stands_alone_beside_a_product(family: str, format: str) -> None:
    """Norm, gate and residual are drawn in: what is left of a layer are its products, its rope and its attention."""
    _, after = transformed(family, "layer_full", format)
    head_norms = 2 if family == "qwen3" else 0  # of queries and keys, behind their product
    assert [count(after, name) for name in ("aten.add", "aten.pow", "aten.silu")] == [head_norms, head_norms, 0]


@pytest.mark.parametrize("family", MODELS)
def test_after_the_last_write_only_sampled_rows_are_computed(family: str) -> None:
    _, graph = transformed(family, "last")
    rows = graph.input_node("hidden").meta["val"].shape[0]
    samples = graph.input_node("sample_index").meta["val"].shape[0]
    products = [node for node in graph.module.graph.nodes if "linear_packed" in str(node.target)]
    sizes = [node.meta["val"].shape[0].node.expr for node in products]
    assert sizes == [rows.node.expr] + [samples.node.expr] * 5  # k and v; then q, o, gate and up, down, head
    [attention] = [node for node in graph.module.graph.nodes if "paged_attention" in str(node.target)]
    assert attention.meta["val"].shape[0].node.expr == samples.node.expr
    assert [str(argument) for argument in attention.args[4:7]] == [
        "sample_rows",
        "sample_query_start",
        "sample_seq_lens",
    ]


def test_a_tied_head_and_the_embedding_are_one_parameter() -> None:
    _, begin = transformed("llama", "begin")
    _, last = transformed("llama", "last")
    table = [recipe for recipe in begin.recipes if recipe.sources == ("embed_tokens.weight.dense",)]
    head = [recipe for recipe in last.recipes if recipe.sources == ("head.embed_tokens.weight.dense",)]
    assert [recipe.packing for recipe in (*table, *head)] == ["toka::pack_linear"] * 2
