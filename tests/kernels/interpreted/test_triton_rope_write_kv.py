"""write_kv and rope_write_kv in Triton against the references.

Triton's interpreter cuts bfloat16 off instead of rounding (a GPU rounds), so what goes into a bfloat16 cache is bfloat16 already, and
turned bfloat16 vectors may be one step off.

Legend: T tokens, H heads, D head dim, F = D / 2.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

BLOCK_SIZE, NUM_BLOCKS = 8, 6
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Step:
    """Queries, keys and values as slices of one merged product; every fifth token is padding."""

    query_THD: Tensor
    key_THD: Tensor
    value_THD: Tensor
    cos_TF: Tensor
    sin_TF: Tensor
    slots_T: Tensor

    def caches(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        _, num_heads, head_dim = self.key_THD.shape
        empty = torch.full((NUM_BLOCKS, num_heads, BLOCK_SIZE, head_dim), 7.0).to(dtype)
        return empty, empty.clone()

    def write(self, namespace: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        caches = self.caches(dtype)
        getattr(torch.ops, namespace).write_kv(self.key_THD, self.value_THD, *caches, self.slots_T)
        return caches

    def rope_write(self, namespace: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        caches = self.caches(dtype)
        op = getattr(torch.ops, namespace).rope_write_kv
        turned_THD = op(self.query_THD, self.key_THD, self.value_THD, self.cos_TF, self.sin_TF, *caches, self.slots_T)
        return turned_THD, *caches


def make_step(num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Step:
    random = torch.Generator().manual_seed(num_tokens * head_dim)
    num_query_heads, num_kv_heads = heads
    merged = torch.randn(num_tokens, (num_query_heads + 2 * num_kv_heads) * head_dim, generator=random)
    merged_THD = merged.bfloat16().to(dtype).unflatten(1, (-1, head_dim))
    angles_TF = torch.rand(num_tokens, head_dim // 2, generator=random) * 6.0
    slots_T = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=random)[:num_tokens]
    slots_T[4::5] = -1
    return Step(
        *merged_THD.split([num_query_heads, num_kv_heads, num_kv_heads], dim=1),
        angles_TF.cos().to(dtype),
        angles_TF.sin().to(dtype),
        slots_T.to(torch.int32 if num_tokens % 2 else torch.int64),
    )


SHAPES = [(0, (4, 2), 64), (1, (1, 1), 64), (6, (20, 17), 40), (7, (9, 3), 96), (5, (2, 1), 256)]
every_shape = pytest.mark.parametrize(("num_tokens", "heads", "head_dim"), SHAPES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@every_shape
@every_dtype
def test_slots_hold_what_was_written(
    num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    step = make_step(num_tokens, heads, head_dim, dtype)
    for cache_dtype in CACHE_DTYPES:
        for actual, expected in zip(
            step.write("toka_triton", cache_dtype), step.write("toka", cache_dtype), strict=True
        ):
            assert torch.equal(actual.float(), expected.float())


@every_shape
@every_dtype
def test_turned_like_the_reference(num_tokens: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    step = make_step(num_tokens, heads, head_dim, dtype)
    for actual, expected in zip(step.rope_write("toka_triton", dtype), step.rope_write("toka", dtype), strict=True):
        assert actual.dtype == dtype and actual.is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    turned_THD, key_cache, value_cache = step.rope_write("toka_triton", dtype)
    assert torch.equal(value_cache, step.write("toka", dtype)[1])
    if num_tokens > 1:
        assert not torch.equal(turned_THD, step.query_THD)
        assert int((key_cache != 7.0).any(dim=-1).any(dim=1).sum()) == int((step.slots_T >= 0).sum())


def test_turned_keys_in_a_float8_cache() -> None:
    step = make_step(7, (4, 2), 64, torch.float32)
    _, key_cache, value_cache = step.rope_write("toka_triton", torch.float8_e4m3fn)
    _, expected_keys, expected_values = step.rope_write("toka", torch.float8_e4m3fn)
    assert torch.equal(value_cache.float(), expected_values.float())
    # A sum in float32 with another rounding may fall to the other side of the middle between two float8 numbers: one step.
    torch.testing.assert_close(key_cache.float(), expected_keys.float(), rtol=0.125, atol=2.0**-9)
    assert float((key_cache.float() == expected_keys.float()).float().mean()) > 0.99


def test_every_half_and_many_floats_as_float8() -> None:
    """Exactly as PyTorch converts, but for numbers beyond ±448, which are stored as ±448, and NaN, which stays NaN of either sign."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    random = torch.Generator().manual_seed(0)
    floats = torch.randn(2**15, generator=random) * torch.tensor([2.0**-9, 1.0, 200.0, 2.0**-6]).repeat(2**13)
    for values in (bits.view(torch.float16), bits.view(torch.bfloat16), floats):
        vectors_THD = values.view(-1, 64, 256)
        caches = [torch.zeros(1, 64, 8, 256).to(torch.float8_e4m3fn) for _ in range(2)]
        slots_T = torch.arange(len(vectors_THD), dtype=torch.int32)
        torch.ops.toka_triton.write_kv(vectors_THD, vectors_THD, *caches, slots_T)
        expected_THD = vectors_THD.float().clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
        for cache in caches:
            stored_THD = cache[0, :, : len(vectors_THD)].transpose(0, 1).float()
            assert torch.equal(stored_THD.isnan(), vectors_THD.isnan())
            assert torch.equal(stored_THD.nan_to_num(), expected_THD.nan_to_num())


def test_vectors_that_are_not_dense() -> None:
    step = make_step(3, (2, 1), 64, torch.float32)
    sparse = torch.zeros(*step.key_THD.shape, 2)
    sparse[..., 0] = step.key_THD
    expected = step.write("toka", torch.float32)
    step.key_THD = sparse[..., 0]
    assert step.key_THD.stride(-1) == 2
    for actual, wanted in zip(step.write("toka_triton", torch.float32), expected, strict=True):
        assert torch.equal(actual, wanted)
