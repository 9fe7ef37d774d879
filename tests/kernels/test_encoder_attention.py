"""Every implementation of encoder_attention for CPUs against the reference, and what it promises about batches."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from toka.kernels.registry import FLOATS, Implementation, implementations

pytestmark = pytest.mark.usefixtures("cpp_kernels")

FAST = [i for i in implementations("encoder_attention") if i.family not in ("reference", "triton")]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
REFERENCE = torch.ops.toka.encoder_attention.default


def step(
    lens: list[int], num_heads: int, head_dim: int, dtype: torch.dtype, num_padded: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value: slices of one tensor, as a merged product gives them; query_start with two empty rows at the end."""
    random = torch.Generator().manual_seed(sum(lens))
    merged_TE = torch.randn(sum(lens) + num_padded, 3 * num_heads * head_dim, generator=random).to(dtype)
    query, key, value = (part.unflatten(1, (num_heads, head_dim)) for part in merged_TE.chunk(3, dim=1))
    starts = [0, *accumulate(lens), sum(lens), sum(lens)]
    return query, key, value, torch.tensor(starts, dtype=torch.int32)


def test_the_reference_is_bidirectional_attention_within_rows() -> None:
    lens = [5, 1, 9]
    query, key, value, starts = step(lens, 2, 16, torch.float32, num_padded=3)
    out = REFERENCE(query, key, value, starts, 0.25)
    for begin, end in ((0, 5), (5, 6), (6, 15)):
        heads_first = (each[begin:end].transpose(0, 1) for each in (query, key, value))
        expected = F.scaled_dot_product_attention(*heads_first, scale=0.25).transpose(0, 1)
        torch.testing.assert_close(out[begin:end], expected)
    assert not out[15:].any()


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
@pytest.mark.parametrize("head_dim", [8, 32, 40, 64, 256])
@pytest.mark.parametrize("lens", [[1], [3, 0, 70, 64], [65, 1, 129, 300]], ids=str)
def test_same_as_the_reference(
    implementation: Implementation, lens: list[int], head_dim: int, dtype: torch.dtype
) -> None:
    arguments = (*step(lens, 3, head_dim, dtype, num_padded=5), head_dim**-0.5)
    out, expected = implementation.overload(*arguments), REFERENCE(*arguments)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not out[sum(lens) :].any()


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_a_row_is_the_same_to_the_bit_in_any_company_and_on_any_number_of_threads(
    implementation: Implementation,
) -> None:
    lens = [40, 200, 7, 130]
    query, key, value, starts = step(lens, 4, 32, torch.float32)
    together = implementation.overload(query, key, value, starts, 0.2)
    threads = torch.get_num_threads()
    for begin, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        alone = torch.tensor([0, end - begin], dtype=torch.int32)
        parts = (each[begin:end] for each in (query, key, value))
        torch.set_num_threads(1)
        try:
            assert torch.equal(implementation.overload(*parts, alone, 0.2), together[begin:end])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)
def test_scores_as_large_as_they_come(implementation: Implementation) -> None:
    query, key, value, starts = step([90], 2, 32, torch.float32)
    arguments = (100 * query, 100 * key, value, starts, 1.0)
    torch.testing.assert_close(implementation.overload(*arguments), REFERENCE(*arguments), atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    query, key, value, starts = step([4], 2, 16, torch.float32)
    overload = torch.ops.toka_cpp.encoder_attention.default
    with pytest.raises(RuntimeError, match="differ in shape"):
        overload(query, key[:, :1], value, starts, 1.0)
    with pytest.raises(RuntimeError, match="query_start must ascend"):
        overload(query, key, value, torch.tensor([0, 5], dtype=torch.int32), 1.0)
    with pytest.raises(RuntimeError, match="query_start must be Int"):
        overload(query, key, value, starts.long(), 1.0)
