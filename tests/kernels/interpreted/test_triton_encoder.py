"""The operators of encoders and of pooling in Triton: what the references say, and nothing that depends on a row's company."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from toka.errors import InvariantError

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = sorted(TOLERANCE, key=str)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def attention_step(lens: list[int], head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value as slices of a merged product, with three tokens and one row of padding."""
    merged_TE = torch.randn(sum(lens) + 3, 3 * 2 * head_dim, generator=torch.Generator().manual_seed(head_dim)).to(
        dtype
    )
    query, key, value = (part.unflatten(1, (2, head_dim)) for part in merged_TE.chunk(3, dim=1))
    return query, key, value, ints(0, *accumulate(lens), sum(lens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 32, 40])
@pytest.mark.parametrize("lens", [[1], [3, 0, 70], [33, 1, 32]], ids=str)
def test_encoder_attention(lens: list[int], head_dim: int, dtype: torch.dtype) -> None:
    arguments = (*attention_step(lens, head_dim, dtype), head_dim**-0.5)
    out, expected = torch.ops.toka_triton.encoder_attention(*arguments), torch.ops.toka.encoder_attention(*arguments)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not out[sum(lens) :].any()


def test_encoder_attention_of_a_row_does_not_depend_on_its_neighbours() -> None:
    query, key, value, starts = attention_step([40, 66, 5], 16, torch.float32)
    together = torch.ops.toka_triton.encoder_attention(query, key, value, starts, 0.2)
    alone = torch.ops.toka_triton.encoder_attention(query[40:106], key[40:106], value[40:106], ints(0, 66), 0.2)
    assert torch.equal(together[40:106], alone)


def test_encoder_attention_refuses_what_does_not_fit() -> None:
    query, key, value, starts = attention_step([4], 16, torch.float32)
    with pytest.raises(InvariantError, match="of one shape"):
        torch.ops.toka_triton.encoder_attention(query, key[:, :1], value, starts, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 40, 300])
def test_sum_tokens(width: int, dtype: torch.dtype) -> None:
    """Rows that begin, one that goes on, one that is padding; and the rest of one that began: to the bit."""
    hidden_TC = torch.randn(60, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    before_MC = torch.randn(6, width)
    sums_MC, expected_MC = before_MC.clone(), before_MC.clone()
    for arguments in (
        (hidden_TC[:40], ints(4, 0, -1, 2), ints(0, 20, 23, 23, 40), ints(20, 33, 0, 17)),
        (hidden_TC[40:], ints(4), ints(0, 20), ints(40)),
    ):
        torch.ops.toka_triton.sum_tokens(*arguments, sums_MC)
        torch.ops.toka.sum_tokens(*arguments, expected_MC)
    assert torch.equal(sums_MC, expected_MC)
    assert torch.equal(sums_MC[[1, 3, 5]], before_MC[[1, 3, 5]])
