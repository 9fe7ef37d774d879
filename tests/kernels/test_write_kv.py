"""Every implementation of write_kv for CPUs against the reference."""

from __future__ import annotations

import pytest
import torch

from toka.kernels.registry import FLOATS, Implementation, implementations

pytestmark = pytest.mark.usefixtures("cpp_kernels")

FAST = [i for i in implementations("write_kv") if i.family not in ("reference", "triton")]
NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM = 40, 3, 8, 40


def written(op: torch._ops.OpOverload, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, dtype: torch.dtype):
    key_cache = torch.full((NUM_BLOCKS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM), 7.0, dtype=dtype)
    value_cache = key_cache.clone()
    op(key, value, key_cache, value_cache, slots)
    return key_cache, value_cache


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("cache_dtype", sorted(FLOATS, key=str), ids=str)
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 300])
def test_slots_hold_what_was_written(
    implementation: Implementation, num_tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    random = torch.Generator().manual_seed(num_tokens)
    both_THD = torch.randn(num_tokens, 2 * NUM_HEADS, HEAD_DIM, generator=random).to(dtype)
    key, value = both_THD[:, :NUM_HEADS], both_THD[:, NUM_HEADS:]  # slices: not contiguous
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=random)[:num_tokens]
    slots[::5] = -1
    for slot_dtype in (torch.int32, torch.int64):
        expected = written(torch.ops.toka.write_kv.default, key, value, slots.to(slot_dtype), cache_dtype)
        actual = written(implementation.overload, key, value, slots.to(slot_dtype), cache_dtype)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    if num_tokens > 1:
        block, offset = divmod(int(slots[1]), BLOCK_SIZE)
        assert torch.equal(actual[0][block, :, offset], key[1].to(cache_dtype))


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_a_large_prefill_is_shared_by_threads(implementation: Implementation) -> None:
    random = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 4096, 2, 64, generator=random)
    caches = [torch.zeros(256, 2, 16, 64) for _ in range(4)]
    slots = torch.randperm(4096, generator=random, dtype=torch.int32)
    torch.ops.toka.write_kv.default(key, value, caches[0], caches[1], slots)
    implementation.overload(key, value, caches[2], caches[3], slots)
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


def test_a_slot_outside_of_the_cache_is_refused() -> None:
    key = torch.zeros(1, NUM_HEADS, HEAD_DIM)
    slots = torch.tensor([NUM_BLOCKS * BLOCK_SIZE], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="outside of the cache"):
        written(torch.ops.toka_cpp.write_kv.default, key, key, slots, torch.float32)
