"""batch_invariant=T: a request's logits are the same to the bit whatever runs beside it, whichever bucket it falls in, however its
prompt was cut and whether its prefix was in the cache. Asked of compiled code, the sampler put aside by one that keeps its logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from toka.compile import builder, lower
from toka.compile.compiled_model import CompiledModel, LoadedRegion
from toka.compile.forked import is_possible, run_forked, run_in_turn
from toka.config import Config
from toka.kernels.op_schema import SCHEMAS
from toka.model_source import ModelSource
from toka.models.registry import build_model
from toka.params import MAX_STOP_TOKEN_IDS
from toka.plan import BatchPlan, BlockTableChanges, RowSettings, SharedPrefixPlan
from toka.runner.kv_cache import KVCache
from toka.runner.model_runner import ModelRunner
from toka.runner.step_program import build_step_graph, kv_cache_shape, step_parameters
from toka.warmup.code import families_of, is_batch_invariant, kernel_chooser
from toka.warmup.setup import settle
from toka.weights.loader import load_weights, open_checkpoint

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_BLOCKS = 8, 256
PROMPT = [7 + 11 * i % 300 for i in range(61)]

_logits: dict[int, Tensor] = {}
_library = torch.library.Library("toka_test", "FRAGMENT")
_library.define("sample" + SCHEMAS["sample"])


def _keep_logits(logits_RV: Tensor, rows_R: Tensor, *others: Tensor) -> Tensor:
    _logits.update(zip(rows_R.tolist(), logits_RV.clone(), strict=True))
    return torch.ops.toka.sample(logits_RV, rows_R, *others)


_library.impl("sample", _keep_logits, "CPU")
torch.library.register_fake("toka_test::sample", lambda logits_RV, rows_R, *_: rows_R.new_empty(rows_R.shape))


@pytest.fixture(scope="module")
def runner(
    random_checkpoint: Callable[[str], Path],
    cpp_kernels: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ModelRunner]:
    path = random_checkpoint("qwen3")
    flags = {"max_tokens_per_forward": 160, "max_seqs_per_forward": 40, "page_size": BLOCK_SIZE, "num_threads": 2}
    setup = settle(
        Config(model=str(path), device="cpu", batch_invariant=True, **flags),
        ModelSource("hf_dir", path, path, path.name),
    )
    with torch.no_grad():
        model = build_model(setup.spec, setup.dtype)
        graph = build_step_graph(model, setup.dtype, BLOCK_SIZE)
        regions, chosen = builder.transform(graph, CPU, kernel_chooser(setup, families_of(CPU)))
        assert is_batch_invariant(builder.kernel_entries(chosen))
        directory = tmp_path_factory.mktemp("regions")
        files = {region.name: directory / f"{region.name}.pt2" for region in regions}
        for region in regions:
            for node in region.module.graph.nodes:
                if node.target is torch.ops.toka_cpp.sample.default:
                    node.target = torch.ops.toka_test.sample.default
        calls = [partial(lower.compile_to_file, region, files[region.name]) for region in regions]
        list(run_forked(calls, 2) if is_possible("cpu") else run_in_turn(calls))
        code = {
            region.name: LoadedRegion(lower.load_compiled(files[region.name], CPU), tuple(region.recipes))
            for region in regions
        }
        load_weights(model, open_checkpoint(path), CPU, lambda done, total: None)
        compiled = CompiledModel(graph, code)
        compiled.bind(step_parameters(model))
        made = ModelRunner(compiled, setup.runner_sizes, CPU)
        made.attach(KVCache(kv_cache_shape(model, setup.dtype, BLOCK_SIZE), NUM_BLOCKS, CPU))
    yield made


@dataclass(frozen=True)
class Part:
    """Tokens begin .. end of a request in a row, whose block table begins with `blocks`."""

    row: int
    token_ids: Sequence[int]
    begin: int
    end: int
    blocks: Sequence[int]


def logits(runner: ModelRunner, parts: Sequence[Part]) -> dict[int, Tensor]:
    """Run one step of these parts; the logits after each part's last token, by row."""
    _logits.clear()
    runner.run(_plan(parts))
    return dict(_logits)


def _plan(parts: Sequence[Part]) -> BatchPlan:
    def int32(values: Sequence[int]) -> np.ndarray:
        return np.array(values, dtype=np.int32)

    rows, num_rows = int32([part.row for part in parts]), len(parts)
    blocks = [(part.row, column, block) for part in parts for column, block in enumerate(part.blocks)]
    table = (int32([entry[i] for entry in blocks]) for i in range(3))
    zeros = np.zeros(num_rows, dtype=np.float32)
    return BatchPlan(
        step=0,
        rows=rows,
        query_start=int32([0, *itertools.accumulate(part.end - part.begin for part in parts)]),
        token_ids=int32([token for part in parts for token in part.token_ids[part.begin : part.end]]),
        seq_lens=int32([part.end for part in parts]),
        samples=np.ones(num_rows, dtype=np.bool_),
        table=BlockTableChanges(*table),
        settings=RowSettings(
            rows=rows,
            temperature=zeros,
            top_k=int32([0] * num_rows),
            top_p=zeros + 1,
            min_p=zeros,
            seed=np.zeros(num_rows, dtype=np.int64),
            held_back_ids=np.full((num_rows, MAX_STOP_TOKEN_IDS), -1, dtype=np.int32),
            held_back_until=int32([0] * num_rows),
        ),
    )


def whole(row: int, token_ids: Sequence[int], first_block: int) -> Part:
    return Part(row, token_ids, 0, len(token_ids), range(first_block, first_block + -(-len(token_ids) // BLOCK_SIZE)))


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> Tensor:
    """After the whole prompt, nothing beside it."""
    return logits(runner, [whole(0, PROMPT, 0)])[0]


@pytest.mark.parametrize("num_others", [1, 2, 7, 13, 14, 39])
def test_neighbours_change_nothing(runner: ModelRunner, alone: Tensor, num_others: int) -> None:
    others = [whole(row, [row] * (1 + row % 3), 8 + row) for row in range(1, num_others + 1)]
    for place in (0, num_others // 2, num_others):
        parts = [*others[:place], whole(40, PROMPT, 100), *others[place:]]
        assert torch.equal(logits(runner, parts)[40], alone)


@pytest.mark.parametrize("cuts", [[1], [60], [8, 16, 24], [5, 6, 7, 40], list(range(1, 61))], ids=str)
def test_a_prompt_in_parts_is_the_prompt(runner: ModelRunner, alone: Tensor, cuts: list[int]) -> None:
    """The last cut leaves a last part of one token too, which is a decode step."""
    ends = [*cuts, len(PROMPT)]
    for begin, end in itertools.pairwise([0, *ends]):
        last = logits(runner, [Part(3, PROMPT, begin, end, range(50, 58))])[3]
    assert torch.equal(last, alone)


@pytest.mark.parametrize("num_cached", [8, 32, 56])
def test_a_cached_prefix_is_as_good_as_new(runner: ModelRunner, alone: Tensor, num_cached: int) -> None:
    logits(runner, [Part(9, PROMPT, 0, num_cached, range(20, 28))])  # another request that began alike
    shared = [*range(20, 20 + num_cached // BLOCK_SIZE), *range(60, 68)]
    assert torch.equal(logits(runner, [Part(4, PROMPT, num_cached, len(PROMPT), shared)])[4], alone)


@pytest.mark.parametrize("num_sharing", [2, 5, 30])
def test_attention_over_a_shared_prefix_changes_nothing(runner: ModelRunner, num_sharing: int) -> None:
    """Rows with 64 tokens in common and tails of their own decode as a group, beside a row that decodes alone and one that prefills."""
    common, shared_blocks = [3 + 7 * i % 300 for i in range(64)], list(range(64 // BLOCK_SIZE))
    prompts = {row: [*common, *[9 + row] * (2 + row % 4)] for row in range(num_sharing)}
    alone = {row: logits(runner, [whole(row, prompt, 0)])[row] for row, prompt in prompts.items()}

    lone, prefilling = PROMPT, whole(36, [5] * 20, 240)
    blocks = {row: [*shared_blocks, 100 + 2 * row, 101 + 2 * row] for row in prompts}
    logits(runner, [Part(0, prompts[0], 0, 64, blocks[0])])
    for row, prompt in prompts.items():
        logits(runner, [Part(row, prompt, 64, len(prompt) - 1, blocks[row])])
    logits(runner, [Part(35, lone, 0, 60, range(200, 208))])
    decodes = [Part(row, prompt, len(prompt) - 1, len(prompt), blocks[row]) for row, prompt in prompts.items()]
    decodes.insert(num_sharing // 2, Part(35, lone, 60, 61, range(200, 208)))
    members = [place for place, part in enumerate(decodes) if part.row != 35]
    shared = SharedPrefixPlan(
        groups=np.array([[0, 0, len(members), 0, 64]], dtype=np.int32),
        members=np.array(members, dtype=np.int32),
        lens=np.array([64 * (part.row != 35) for part in decodes], dtype=np.int32),
    )
    runner.run(replace(_plan([*decodes, prefilling]), shared=shared))
    assert all(torch.equal(_logits[row], expected) for row, expected in alone.items())


def test_every_bucket_gives_the_same(runner: ModelRunner, alone: Tensor) -> None:
    """One long neighbour, so long that the step falls into each larger bucket in turn."""
    seen = set()
    for size in runner.token_sizes:
        if len(PROMPT) < size <= runner.sizes.max_tokens:
            filler = whole(1, [5] * (size - len(PROMPT)), 100)
            seen.add(runner.bucket_for(size, 2).num_tokens)
            assert torch.equal(logits(runner, [whole(0, PROMPT, 0), filler])[0], alone)
    assert len(seen) >= 10


def test_the_number_of_threads_changes_nothing(runner: ModelRunner, alone: Tensor) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(logits(runner, [whole(0, PROMPT, 0)])[0], alone)
    finally:
        torch.set_num_threads(before)


def test_the_logits_are_those_of_this_prompt(runner: ModelRunner, alone: Tensor) -> None:
    """So that the others could fail."""
    assert not torch.equal(logits(runner, [whole(0, [*PROMPT[:-1], 3], 0)])[0], alone)
    assert float(alone.std()) > 0
