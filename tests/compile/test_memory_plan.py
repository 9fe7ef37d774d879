"""What a step is foretold to allocate: rule by rule by hand, and against what compiled code allocates."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toka.compile.memory_plan import (
    WORKSPACES,
    RegionMemory,
    SizedTensor,
    Workspace,
    parameter_bytes,
    region_memory,
    step_activations,
)
from toka.compile.region_graph import Recipe
from toka.compile.step_graph import Call, OperatorCall, Region, StepGraph, TensorSpec
from toka.compile.trace import trace

WIDTH, TOKENS = 32, 50
ROW = TOKENS * WIDTH * 4  # bytes of one float32 tensor [T, WIDTH]


class Body(nn.Module):
    def __init__(self, compute: Callable[..., tuple[Tensor, ...]]):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH, WIDTH, device="meta"), requires_grad=False)
        self._compute = compute

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self._compute(x, self.weight)


def region(compute: Callable[..., tuple[Tensor, ...]], num_outputs: int = 1) -> Region:
    return Region("r", Body(compute), (("x", TensorSpec(torch.float32, ("T", WIDTH))),), num_outputs)


def memory(
    compute: Callable[..., tuple[Tensor, ...]], num_outputs: int = 1, device: str = "cpu", tokens: int = TOKENS
) -> RegionMemory:
    traced = region(compute, num_outputs)
    return region_memory(traced, trace(traced, torch.device("cpu")).module, {"T": tokens}, device)


def test_pointwise_work_is_done_in_its_reader() -> None:
    found = memory(lambda x, w: ((x + 1) * 2 - x.relu(),))
    assert (found.peak, found.outputs, found.num_kernels) == (ROW, (ROW,), 1)


def test_a_product_needs_buffers_on_both_sides() -> None:
    assert memory(lambda x, w: (F.linear(x + 1, w),)).peak == 2 * ROW
    assert memory(lambda x, w: (F.linear(x, w),)).peak == ROW  # x is the caller's


def test_a_pointwise_result_goes_over_what_is_read_last() -> None:
    assert memory(lambda x, w: (F.linear(x, w).relu(),)).peak == ROW


def test_views_take_nothing_and_keep_what_they_see() -> None:
    found = memory(lambda x, w: (F.linear(x, w).view(-1, 2, WIDTH // 2)[:, 0],))
    assert found == RegionMemory(ROW, (ROW,), 1)
    assert memory(lambda x, w: (x.view(-1, 2, WIDTH // 2),)).outputs == (0,)  # the input's memory


def test_a_reduction_is_a_buffer() -> None:
    assert memory(lambda x, w: (x * x.mean(-1, keepdim=True),)).peak == ROW + TOKENS * 4


def test_parts_are_computed_inside_what_joins_them() -> None:
    found = memory(lambda x, w: (torch.cat((x + 1, x * 2), -1),))
    assert (found.peak, found.num_kernels) == (2 * ROW, 1)


def test_on_cpu_an_exponential_is_not_computed_twice() -> None:
    def twice(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        shared = x.sigmoid()
        return (shared + 1, shared * 2)

    assert memory(twice, 2, "cpu").peak == 2 * ROW  # one result goes over the shared value
    assert memory(twice, 2, "cpu").num_kernels == 3
    assert memory(twice, 2, "cuda").num_kernels == 2


def test_the_compilers_choice_of_an_order() -> None:
    """As written both wide values live at once; one after the other is better."""

    def narrow_sums(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        first, second = F.linear(x, w), F.linear(x + 1, w)
        return (first.sum(-1) + second.sum(-1),)

    assert memory(narrow_sums).peak < 3 * ROW


def test_sizes_are_symbolic() -> None:
    assert memory(lambda x, w: (x + 1,), tokens=7).peak * TOKENS == 7 * ROW


def test_a_declared_workspace_counts_while_its_kernel_runs() -> None:
    traced = region(lambda x, w: (F.linear(F.linear(x, w), w),))
    module, sizes = trace(traced, torch.device("cpu")).module, {"T": TOKENS}
    seen: list[tuple[object, object]] = []

    def workspace(given: object, returned: object) -> int:
        seen.append((given, returned))
        return 1000

    plain = region_memory(traced, module, sizes, "cpu", {}).peak
    assert region_memory(traced, module, sizes, "cpu", {("cuda", "aten::linear"): workspace}).peak == plain
    assert region_memory(traced, module, sizes, "cpu", {("cpu", "aten::linear"): workspace}).peak == plain + 1000
    x, weight = SizedTensor((TOKENS, WIDTH), torch.float32), SizedTensor((WIDTH, WIDTH), torch.float32)
    assert seen == [([x, weight], [x])] * 2


def test_what_triton_kernels_take_for_themselves() -> None:
    """By hand: the sampler cuts 128,256 logits into 32 chunks, token_logprobs into 63 of 20 candidates each; a row's 131,072 keys make 64
    splits, each a float32 head and one more.

    Where rows can share prefixes, each of three levels has two numbers, and up to 16 splits, as far as those of all the table's rows fit in
    128 MiB.
    """
    logits = SizedTensor((10, 128_256), torch.bfloat16)
    chunks, lists = 32 * (4 + 4 + 6 * (8 + 4)), 6 * 4 + 8192 * 4
    assert WORKSPACES["cuda", "toka_triton::sample"]([logits], []) == 10 * (chunks + lists)
    top_ids = SizedTensor((10, 20), torch.int32)
    found = WORKSPACES["cuda", "toka_triton::token_logprobs"]([logits], [top_ids, top_ids, top_ids, top_ids])
    assert found == 10 * 63 * (4 + 4 + 4 + 20 * 8)
    query, cache = SizedTensor((9, 32, 128), torch.bfloat16), SizedTensor((1, 8, 16, 128), torch.bfloat16)
    table, rows, starts = (SizedTensor(shape, torch.int32) for shape in ((64, 8192), (4,), (5,)))
    attention = WORKSPACES["cuda", "toka_triton::paged_attention"]
    assert attention([query, cache, cache, table, rows, starts, rows], []) == 4 * 32 * 64 * (128 + 1) * 4
    shared = [SizedTensor(shape, torch.int32) for shape in ((16, 5), (256,), (64,))]
    levels = 4 * 3 * 2 * 4
    with_shared = attention([query, cache, cache, table, rows, starts, rows, *shared], [])
    assert with_shared == 4 * 32 * (64 + 3 * 16) * (128 + 1) * 4 + levels
    many = SizedTensor((256, 8192), torch.int32)
    with_shared = attention([query, cache, cache, many, rows, starts, rows, *shared], [])
    assert with_shared == 4 * 32 * (64 + 3 * 10) * (128 + 1) * 4 + levels
    short = SizedTensor((64, 16), torch.int32)  # 256 tokens: nothing is split
    assert attention([query, cache, cache, short, rows, starts, rows], []) == 0
    assert attention([query, cache, cache, short, rows, starts, rows, *shared], []) == 4 * 32 * 4 * 129 * 4 + levels


def test_values_live_until_their_name_is_written_again() -> None:
    traced = region(lambda x, w: (F.linear(x + 1, w),))
    modules = {"r": trace(traced, torch.device("cpu")).module}

    def peak(*values: str) -> int:
        calls = tuple(Call("r", ("weight",), (source,), (result,)) for source, result in itertools.pairwise(values))
        graph = StepGraph((traced,), calls, ("x",), (values[-1],))
        return step_activations(graph, modules, {"T": TOKENS}, "cpu").peak

    assert peak("x", "y") == 2 * ROW
    assert peak("x", "y", "y", "y") == 3 * ROW
    assert peak("x", "a", "b", "c") == 4 * ROW


def test_a_follow_up_runs_when_all_but_the_outputs_is_gone() -> None:
    traced = region(lambda x, w: (F.linear(x, w),))
    modules = {"r": trace(traced, torch.device("cpu")).module}
    calls = tuple(Call("r", ("weight",), ("x",), (result,)) for result in ("a", "b", "c"))
    without = StepGraph((traced,), calls, ("x",), ("c",))
    assert step_activations(without, modules, {"T": TOKENS}, "cpu").peak == 3 * ROW
    logits, ids = TensorSpec(torch.float32, ("T", WIDTH)), TensorSpec(torch.int32, ("T",))
    with_it = dataclasses.replace(
        without, follow_up=OperatorCall("token_logprobs", (("c", logits), ("ids", ids)), (60,))
    )
    workspaces: dict[tuple[str, str], Workspace] = {("cpu", "toka_cpp::token_logprobs"): lambda given, returned: 1000}
    found = step_activations(with_it, modules, {"T": TOKENS}, "cpu", workspaces)
    of_operator = TOKENS * (4 + 4 + 4 + 60 * 8)  # ids, logprob, rank, and 60 likeliest
    assert (found.peak, found.largest_region) == (ROW + of_operator + 1000, "token_logprobs")


def test_parameters_count_once_however_often_they_are_used() -> None:
    traced = region(lambda x, w: (F.linear(x, w),))
    calls = tuple(Call("r", (name,), ("x",), ("x",)) for name in ("first", "second", "first"))
    graph = StepGraph((traced,), calls, ("x",), ("x",))
    transformed = trace(traced, torch.device("cpu"))
    assert parameter_bytes(graph, [transformed]) == 2 * WIDTH * WIDTH * 4
    packed = dataclasses.replace(transformed, recipes=[Recipe((("weight",),), "toka::pack_linear")])
    assert parameter_bytes(graph, [packed]) == 2 * WIDTH * WIDTH * 4  # the shape is the placeholder's


@pytest.mark.parametrize("compute", [
    lambda x, w: (F.linear(x + 1, w),),
    lambda x, w: (F.linear(F.silu(F.linear(x, w)) * F.linear(x + 2, w), w) + x,),
    lambda x, w: (torch.cat((F.linear(x, w).chunk(2, -1)[0].exp(), x * x.pow(2).mean(-1, keepdim=True)), -1),),
], ids=["product", "gated", "norm"])  # fmt: skip
def test_compiled_code_allocates_what_is_foretold(compute: Callable[..., tuple[Tensor, ...]]) -> None:
    from toka.warmup.memory import peak_of_cpu_tensors

    program = torch.export.export(
        Body(compute).to_empty(device="cpu"),
        (torch.randn(13, WIDTH),),
        dynamic_shapes=({0: torch.export.Dim("T", min=1)},),
    )
    compiled = torch._inductor.aoti_load_package(torch._inductor.aoti_compile_and_package(program))
    for tokens in (1, 7, TOKENS, 500):
        x = torch.randn(tokens, WIDTH)
        assert peak_of_cpu_tensors(lambda x=x: compiled(x)) == memory(compute, tokens=tokens).peak
