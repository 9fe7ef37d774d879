from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from toka.config import Config, DeviceFacts, ResolvedConfig, resolve
from toka.errors import ConfigError
from toka.runner.kv_cache import KVCacheShape
from toka.warmup.memory import (
    MemoryTable,
    PeakMemory,
    StepMemory,
    available_memory_bytes,
    measure_step,
    num_kv_blocks,
    peak_of_cpu_tensors,
    room_for_kv_cache,
    tensor_bytes,
    total_memory_bytes,
)

SHAPE = KVCacheShape(num_layers=2, num_kv_heads=3, head_dim=8, block_size=16, dtype=torch.float16)


def config(**changes: object) -> ResolvedConfig:
    fields = dict(
        device="cpu",
        dtype="float16",
        num_threads=1,
        block_size=16,
        kv_cache_num_tokens=None,
        quantize="auto",
        quantize_exclude=(),
        quantize_lm_head=False,
        int8_activations=True,
        kv_cache_memory_fraction=0.5,
        prefix_cache=True,
        max_tokens_per_forward=64,
        max_seqs_per_forward=4,
        max_context_tokens=100,
        steps_in_flight=2,
        track_early_stopping=True,
        use_hydragen=True,
        hydragen_min_group_size=8,
        hydragen_min_prefix_len=256,
        torch_compile=True,
        artifact_path=None,
        batch_invariant=False,
        max_captured_tokens=0,
        token_step=0,
        cache_path=Path(),
        cxx=None,
    )
    return ResolvedConfig(**{**fields, **changes})


def test_bytes_of_a_block() -> None:
    assert SHAPE.bytes_per_block == 2 * 2 * 3 * 16 * 8 * 2
    assert SHAPE.bytes_per_token * 16 == SHAPE.bytes_per_block


def test_the_share_of_what_is_left() -> None:
    assert num_kv_blocks(config(), SHAPE, available_bytes=20 * SHAPE.bytes_per_block) == 10


def test_never_more_than_a_full_step_can_use() -> None:
    assert num_kv_blocks(config(), SHAPE, available_bytes=10**12) == 4 * 7  # 100 tokens are 7 blocks


def test_the_flag_wins_in_whole_blocks() -> None:
    assert num_kv_blocks(config(kv_cache_num_tokens=1000), SHAPE, available_bytes=10**9) == 62


def test_the_flag_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_num_tokens=1000000 needs .* GiB"):
        num_kv_blocks(config(kv_cache_num_tokens=1_000_000), SHAPE, available_bytes=10**6)
    with pytest.raises(ConfigError, match="kv_cache_num_tokens=20"):
        num_kv_blocks(config(kv_cache_num_tokens=20), SHAPE, available_bytes=10**9)


def test_no_memory_left() -> None:
    with pytest.raises(ConfigError, match="no memory is left"):
        num_kv_blocks(config(), SHAPE, available_bytes=SHAPE.bytes_per_block)


def test_a_step_is_no_larger_than_its_requests_allow() -> None:
    facts = DeviceFacts(kind="cpu", native_bfloat16=False, total_memory_bytes=2**33, num_cores=2)
    flags = Config(max_seqs_per_forward=4, max_num_tokens_per_request=100)
    assert resolve(flags, {"max_position_embeddings": 8192}, facts).max_tokens_per_forward == 4 * 99


def test_the_machine_has_memory() -> None:
    assert 0 < available_memory_bytes(torch.device("cpu")) <= total_memory_bytes()


def test_peak_memory_sees_what_is_freed_again() -> None:
    with (
        PeakMemory() as peak,
        mmap.mmap(-1, 64 * 2**20) as pages,
    ):  # fresh pages: an allocator may hand out what is resident already
        pages.write(b"x" * len(pages))
    assert 60 * 2**20 < peak.num_bytes < 400 * 2**20


def test_the_table_lists_every_field_in_order() -> None:
    table = MemoryTable(weights=1, tables=2, activations=3, graph_pools=4, workspace=5, kv_cache=6, headroom=7)
    assert list(table.rows().values()) == list(range(1, 8))
    assert set(table.rows()) == set(MemoryTable.__dataclass_fields__)


def test_a_tensor_that_is_listed_twice_counts_once() -> None:
    tensor = torch.empty(3, 5, dtype=torch.float16, device="meta")
    assert tensor_bytes([tensor, tensor, torch.empty(2)]) == 30 + 8


def test_the_cache_gets_what_a_step_leaves() -> None:
    step = StepMemory(activation_bytes=10, workspace_bytes=20)
    assert room_for_kv_cache(100, step, graph_pools=30) == 40
    assert room_for_kv_cache(50, step, graph_pools=30) == 0


def test_the_peak_of_tensors_is_exact() -> None:
    def work() -> None:
        first = torch.empty(1000, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        third = torch.empty(700, dtype=torch.uint8)
        del second, third

    before = torch.empty(10_000)
    assert peak_of_cpu_tensors(work) == 1500
    assert peak_of_cpu_tensors(before.zero_) == 0  # what was there before is not the step's


def test_a_failing_step_leaves_no_profiler_behind() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_of_cpu_tensors(lambda: 1 // 0)
    assert peak_of_cpu_tensors(lambda: torch.empty(8, dtype=torch.uint8)) == 8


def test_what_is_no_tensor_is_workspace() -> None:
    def work() -> None:
        tensor = torch.ones(4 * 2**20)
        with mmap.mmap(-1, 64 * 2**20) as pages:
            pages.write(b"x" * len(pages))
        del tensor

    step = measure_step(work, torch.device("cpu"))
    assert step.activation_bytes == 16 * 2**20
    assert 40 * 2**20 < step.workspace_bytes < 400 * 2**20
    assert step.total_bytes == step.activation_bytes + step.workspace_bytes


def test_on_cuda_groups_and_batch_invariance_exclude_each_other() -> None:
    facts = DeviceFacts(kind="cuda", native_bfloat16=True, total_memory_bytes=2**36, num_cores=8)
    with pytest.raises(ConfigError, match="use_hydragen=T batch_invariant=T"):
        resolve(Config(use_hydragen=True, batch_invariant=True), {}, facts)
    assert not resolve(Config(batch_invariant=True), {}, facts).use_hydragen
    assert resolve(Config(use_hydragen=True), {}, facts).hydragen_min_group_size == 32
