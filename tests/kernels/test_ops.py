"""The operators as torch sees them: schemas, fakes, aliasing, tracing with symbolic sizes, compiling."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import toka.kernels.ops
from toka.kernels.op_schema import SCHEMAS
from toka.kernels.registry import IMPLEMENTATIONS

sys.path.insert(0, str(Path(__file__).parent))  # adjusted_case lies beside the tests

from adjusted_case import case

pytestmark = pytest.mark.usefixtures("cpp_kernels")

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE, MAX_ROWS, VOCAB_SIZE = 4, 2, 32, 8, 6, 50


def tables() -> dict[str, Tensor]:
    return {
        "temperature": torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, 2.0]),
        "top_k": torch.tensor([0, 5, 0, 0, 0, 3], dtype=torch.int32),
        "top_p": torch.full((MAX_ROWS,), 0.9),
        "min_p": torch.zeros(MAX_ROWS),
        "seed": torch.arange(MAX_ROWS),
        "held_back_ids": torch.full((MAX_ROWS, 16), -1, dtype=torch.int32),
        "held_back_until": torch.zeros(MAX_ROWS, dtype=torch.int32),
        "last_token": torch.zeros(MAX_ROWS, dtype=torch.int32),
    }


def step_inputs(lens: list[int], num_padded: int = 2) -> dict[str, Tensor]:
    """A prefill of one row per entry, rows in order, each row in blocks of its own."""
    num_tokens = sum(lens) + num_padded
    blocks_per_row = 4
    slots = [i * blocks_per_row * BLOCK_SIZE + t for i, length in enumerate(lens) for t in range(length)]
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    random = torch.Generator().manual_seed(len(lens))
    return {
        "hidden_TE": torch.randn(num_tokens, (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, generator=random),
        "key_cache": torch.zeros(MAX_ROWS * blocks_per_row, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM),
        "value_cache": torch.zeros(MAX_ROWS * blocks_per_row, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM),
        "block_table": torch.arange(MAX_ROWS * blocks_per_row, dtype=torch.int32).view(MAX_ROWS, blocks_per_row),
        "slots_T": torch.tensor(slots + [-1] * num_padded, dtype=torch.int32),
        "rows_R": torch.tensor([*range(len(lens)), -1], dtype=torch.int32),
        "query_start": torch.cat([starts, starts[-1:]]),
        "seq_lens_R": torch.tensor([*lens, 0], dtype=torch.int32),
    }


def arguments(op: str, lens: list[int]) -> tuple[Any, ...]:
    given = step_inputs(lens)
    qkv_THD = given["hidden_TE"].view(-1, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM)
    query, key, value = qkv_THD.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    if op == "write_kv":
        return key, value, given["key_cache"], given["value_cache"], given["slots_T"]
    if op == "paged_attention":
        places = (
            given[name] for name in ("key_cache", "value_cache", "block_table", "rows_R", "query_start", "seq_lens_R")
        )
        return query, *places, 0.1, 0
    if op == "rope_write_kv":
        angles = torch.randn(len(query), HEAD_DIM // 2)
        caches = given["key_cache"], given["value_cache"]
        return query, key, value, angles.cos(), angles.sin(), *caches, given["slots_T"]
    if op == "adjust_logits":
        return case(VOCAB_SIZE)
    if op == "encoder_attention":
        return query[:, :NUM_KV_HEADS], key, value, given["query_start"], 0.1
    if op == "sum_tokens":
        sums = torch.zeros(MAX_ROWS, given["hidden_TE"].shape[1])
        return given["hidden_TE"], given["rows_R"], given["query_start"], given["seq_lens_R"], sums
    if op != "sample":
        return product_arguments(op, len(query))
    return torch.randn(len(lens) + 1, VOCAB_SIZE), given["rows_R"], given["seq_lens_R"], *tables().values()


def product_arguments(op: str, num_rows: int) -> tuple[Any, ...]:
    """Of the operators that are products, or work on parts of attention or on logits."""
    x, weight, bias = torch.randn(num_rows, 12), torch.randn(VOCAB_SIZE, 12), torch.randn(VOCAB_SIZE)
    ids = torch.arange(num_rows, dtype=torch.int32)
    panels = torch.ops.toka.pack_linear(weight)
    rows = torch.randn(num_rows, 16)
    codes, scales = torch.randint(256, (VOCAB_SIZE, 8), dtype=torch.uint8), torch.rand(VOCAB_SIZE, 2).half()
    quantised = torch.ops.toka.pack_quantised(4, codes, scales, -scales)
    return {
        "linear": (x, weight, bias),
        "pack_linear": (weight,),
        "linear_packed": (x, panels, bias, VOCAB_SIZE),
        "embedding_packed": (ids, panels),
        "linear_quantised": (rows, codes, scales, -scales, bias, 4, True),
        "embedding_quantised": (ids, codes, scales, -scales, 4, torch.float32),
        "pack_quantised": (4, codes, scales, -scales),
        "linear_quantised_packed": (rows, quantised, bias, VOCAB_SIZE, 4, 2, True, True),
        "embedding_quantised_packed": (ids, quantised, 16, 4, 2, True, torch.float32),
        "merge_attention": (torch.randn(3, num_rows, 4, 8), torch.randn(3, num_rows, 4)),
        "sparse_logits": (x, weight, torch.stack([ids, ids - 1], dim=1)),
        "token_logprobs": (torch.randn(num_rows, VOCAB_SIZE), ids - 1, 3),
    }[op]


class Step(torch.nn.Module):
    """As small as a model's step can be: project nothing, write, attend, sample."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.ops = getattr(torch.ops, namespace)
        self.head = torch.nn.Linear(NUM_HEADS * HEAD_DIM, VOCAB_SIZE, bias=False)

    def forward(
        self,
        hidden_TE: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        block_table: Tensor,
        slots_T: Tensor,
        rows_R: Tensor,
        query_start: Tensor,
        seq_lens_R: Tensor,
        sampling: dict[str, Tensor],
    ) -> Tensor:
        qkv_THD = hidden_TE.view(-1, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM)
        query, key, value = qkv_THD.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
        self.ops.write_kv(key, value, key_cache, value_cache, slots_T)
        out_THD = self.ops.paged_attention(
            query, key_cache, value_cache, block_table, rows_R, query_start, seq_lens_R, HEAD_DIM**-0.5, 0
        )
        last_RE = out_THD.flatten(1)[(query_start[1:] - 1).long()]
        return self.ops.sample(self.head(last_RE), rows_R, seq_lens_R, *sampling.values())


def dynamic_shapes() -> dict[str, Any]:
    num_tokens, num_rows = Dim("num_tokens", min=2, max=4096), Dim("num_rows", min=2, max=256)
    fixed = dict.fromkeys(("key_cache", "value_cache", "block_table"))
    by_token = {name: {0: num_tokens} for name in ("hidden_TE", "slots_T")}
    by_row = {name: {0: num_rows} for name in ("rows_R", "seq_lens_R")}
    return {**fixed, **by_token, **by_row, "query_start": {0: num_rows + 1}, "sampling": dict.fromkeys(tables())}


IN_CPP = {"pack_linear", *(each.name or each.op for each in IMPLEMENTATIONS if each.family == "cpp")}


@pytest.mark.parametrize(
    ("namespace", "op"), [*(("toka", op) for op in SCHEMAS), *(("toka_cpp", op) for op in sorted(IN_CPP))]
)
@pytest.mark.parametrize("lens", [[5, 1, 9], [1]], ids=str)
def test_opcheck(namespace: str, op: str, lens: list[int]) -> None:
    torch.library.opcheck(getattr(getattr(torch.ops, namespace), op).default, arguments(op, lens))


def test_every_family_has_every_operator_with_the_one_schema() -> None:
    for namespace in (toka.kernels.ops.REFERENCE_NAMESPACE, *toka.kernels.ops.FAST_NAMESPACES):
        for op in SCHEMAS:
            schema = getattr(getattr(torch.ops, namespace), op).default._schema
            reference = getattr(torch.ops.toka, op).default._schema
            assert str(schema).removeprefix(namespace) == str(reference).removeprefix("toka")


@pytest.mark.parametrize("namespace", ["toka", "toka_cpp"])
def test_export_with_symbolic_sizes(namespace: str) -> None:
    module = Step(namespace).eval()
    program = torch.export.export(
        module, (), {**step_inputs([3, 4, 2]), "sampling": tables()}, dynamic_shapes=dynamic_shapes(), strict=False
    )
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    for op in ("write_kv", "paged_attention", "sample"):
        assert called.count(getattr(getattr(torch.ops, namespace), op).default) == 1
    for lens in ([1, 1], [20, 7, 1, 30, 2]):
        eager, exported = {**step_inputs(lens), "sampling": tables()}, {**step_inputs(lens), "sampling": tables()}
        assert torch.equal(program.module()(**exported), module(**eager))
        assert torch.equal(exported["key_cache"], eager["key_cache"]) and eager["key_cache"].any()
        assert torch.equal(exported["sampling"]["last_token"], eager["sampling"]["last_token"])


def test_inductor_compiles_the_step_once_for_all_sizes() -> None:
    module = Step("toka_cpp").eval()
    compiled = torch.compile(module, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for lens in ([3, 4, 2], [1, 1], [20, 7, 1, 30, 2]):
            given, expected = {**step_inputs(lens), "sampling": tables()}, {**step_inputs(lens), "sampling": tables()}
            for name in ("hidden_TE", "slots_T", "rows_R", "query_start", "seq_lens_R"):
                torch._dynamo.mark_dynamic(given[name], 0)
            assert torch.equal(compiled(**given), module(**expected))
            assert torch.equal(given["value_cache"], expected["value_cache"])
            assert torch.equal(given["sampling"]["last_token"], expected["sampling"]["last_token"])
