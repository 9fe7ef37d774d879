"""rope_write_kv in C++ against the reference; float32 to the bit, 16-bit activations by their rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toka.kernels.registry import FLOATS

pytestmark = pytest.mark.usefixtures("cpp_kernels")

DTYPES = sorted(FLOATS, key=str)
NUM_HEADS, NUM_KV_HEADS, NUM_BLOCKS, BLOCK_SIZE = 9, 3, 40, 8
# The reference rounds two products and their sum, the kernel the sum only: three half units of the largest of the three.
TOLERANCE = {torch.bfloat16: 3 * 2.0**-8, torch.float16: 3 * 2.0**-11}


def step(num_tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """query, key, value (slices of one product), cos, sin, slots; every fifth token and the last one are padding."""
    random = torch.Generator().manual_seed(num_tokens + head_dim)
    qkv_THD = torch.randn(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, head_dim, generator=random).to(dtype)
    angles_TF = 100 * torch.randn(num_tokens, head_dim // 2, generator=random)
    slots_T = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=random)[:num_tokens].to(torch.int32)
    slots_T[::5] = slots_T[-1:] = -1
    parts = qkv_THD.split([NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS], dim=1)
    return *parts, angles_TF.cos().to(dtype), angles_TF.sin().to(dtype), slots_T


def run(namespace: str, inputs: tuple[Tensor, ...], cache_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    *activations, slots_T = inputs
    shape = NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, inputs[0].shape[2]
    key_cache, value_cache = torch.full(shape, 7.0, dtype=cache_dtype), torch.full(shape, 8.0, dtype=cache_dtype)
    turned = getattr(torch.ops, namespace).rope_write_kv(*activations, key_cache, value_cache, slots_T)
    return turned, key_cache, value_cache


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [2, 20, 64, 128, 256])
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 300])
def test_float32_is_the_reference_to_the_bit(num_tokens: int, head_dim: int, cache_dtype: torch.dtype) -> None:
    inputs = step(num_tokens, head_dim, torch.float32)
    actual, expected = run("toka_cpp", inputs, cache_dtype), run("toka", inputs, cache_dtype)
    assert actual[0].is_contiguous()
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [20, 64])
def test_16_bit_is_the_exact_result_rounded(head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    inputs = step(60, head_dim, dtype)
    actual, expected = run("toka_cpp", inputs, cache_dtype), run("toka", inputs, cache_dtype)
    largest = float(inputs[0].abs().max()) * 2**0.5
    for a, e in zip(actual[:2], expected[:2], strict=True):
        # A coarser cache rounds once more, and may go either way.
        atol = (TOLERANCE[dtype] + TOLERANCE.get(cache_dtype, 0.0)) * largest
        torch.testing.assert_close(a.float(), e.float(), rtol=0.0, atol=atol)
    assert torch.equal(actual[2], expected[2])
    in_float32 = run("toka_cpp", (*(tensor.float() for tensor in inputs[:-1]), inputs[-1]), cache_dtype)
    assert torch.equal(actual[0], in_float32[0].to(dtype))


def test_padding_and_other_slots_stay_as_they_were() -> None:
    inputs = step(60, 64, torch.float32)
    slots_T = inputs[-1]
    _, key_cache, value_cache = run("toka_cpp", inputs, torch.float32)
    is_written = torch.zeros(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
    is_written[slots_T[slots_T >= 0].long()] = True
    for cache, before in ((key_cache, 7.0), (value_cache, 8.0)):
        changed = (cache != before).any(dim=3).transpose(1, 2).flatten(0, 1)  # [slots, heads]
        assert torch.equal(changed.all(dim=1), is_written) and torch.equal(changed.any(dim=1), is_written)


def test_a_large_prefill_is_shared_by_threads_and_long_slots_are_taken() -> None:
    query, key, value, cos, sin, _ = step(320, 64, torch.float32)
    slots_T = torch.arange(NUM_BLOCKS * BLOCK_SIZE)
    inputs = query, key, value, cos, sin, slots_T
    actual, expected = run("toka_cpp", inputs, torch.float32), run("toka", inputs, torch.float32)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    query, key, value, cos, sin, slots_T = step(4, 64, torch.float32)
    with pytest.raises(RuntimeError, match="outside of the cache"):
        run("toka_cpp", (query, key, value, cos, sin, slots_T + NUM_BLOCKS * BLOCK_SIZE), torch.float32)
    with pytest.raises(RuntimeError, match="cos and sin must be"):
        run("toka_cpp", (query, key, value, cos[:, :31], sin, slots_T), torch.float32)
    with pytest.raises(RuntimeError, match="must have one dtype"):
        run("toka_cpp", (query, key, value.bfloat16(), cos, sin, slots_T), torch.float32)
    with pytest.raises(RuntimeError, match="head dim must be even"):
        run("toka_cpp", step(4, 63, torch.float32), torch.float32)
