"""Logprobs of tokens in Triton: the reference's ranks, ids and values, however the vocabulary is cut.

Legend: S places, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toka.errors import InvariantError

NAN, INF = float("nan"), float("inf")


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def logits(num_places: int, vocab_size: int, spread: float, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_places, vocab_size, generator=random) * spread).to(dtype)


def check(logits_SV: Tensor, ids_S: Tensor, k: int) -> tuple[Tensor, ...]:
    """What the kernel says, which must be what the reference says."""
    got = torch.ops.toka_triton.token_logprobs(logits_SV, ids_S, k)
    expected = torch.ops.toka.token_logprobs(logits_SV, ids_S, k)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
    for place in (1, 2):  # rank, top ids
        assert torch.equal(got[place], expected[place])
    for place in (0, 3):
        torch.testing.assert_close(got[place], expected[place], atol=2e-5, rtol=1e-6)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 511, 513, 1500])
@pytest.mark.parametrize("spread", [0.01, 4.0, 60.0])
def test_same_as_the_reference(dtype: torch.dtype, vocab_size: int, spread: float) -> None:
    logits_SV = logits(5, vocab_size, spread, dtype)
    check(logits_SV, ids(0, vocab_size - 1, -1, vocab_size // 2, int(logits_SV[4].argmax())), 20)


def test_a_large_vocabulary() -> None:
    check(logits(2, 49_155, 2.0, torch.bfloat16), ids(16_384, 49_154), 20)


def test_a_token_has_one_value_to_the_bit() -> None:
    logits_SV = logits(8, 1100, 3.0)
    for place in (0, 4):
        wanted = torch.ops.toka.token_logprobs(logits_SV, logits_SV.argmax(1).int(), 5)[2][:, place].contiguous()
        logprob, rank, top_ids, top_logprobs = check(logits_SV, wanted, 5)
        assert torch.equal(logprob, top_logprobs[:, place]) and torch.equal(top_ids[:, place], wanted)
        assert rank.tolist() == [place + 1] * 8


def test_equals_come_in_the_order_of_their_ids() -> None:
    """Also across the border of two chunks, and with zeros of either sign."""
    logits_SV = torch.zeros(3, 1100)
    logits_SV[0, ::3] = -0.0
    logits_SV[1, 500::20] = 1.0
    logits_SV[2] = logits(1, 1100, 1.0).round()
    _, rank, top_ids, _ = check(logits_SV, ids(70, 520, 1099), 6)
    assert top_ids[:2].tolist() == [[0, 1, 2, 3, 4, 5], [500, 520, 540, 560, 580, 600]]
    assert rank.tolist()[:2] == [71, 2]


def test_broken_logits() -> None:
    logits_SV = torch.full((4, 600), -INF)
    logits_SV[0, :2] = torch.tensor([NAN, 0.0])
    logits_SV[1, [3, 599]] = INF
    logits_SV[2] = NAN
    logits_SV[3, 599] = 3.0
    logprob, _, top_ids, top_logprobs = check(logits_SV, ids(1, 599, 2, 0), 3)
    assert logprob.tolist() == [0.0, pytest.approx(torch.tensor(0.5).log().item()), -INF, -INF]
    assert top_ids.tolist() == [[1, 0, 2], [3, 599, 0], [0, 1, 2], [599, 0, 1]]
    assert not top_logprobs.isnan().any()


def test_strides_few_likeliest_and_no_place() -> None:
    wide_SV = logits(3, 40, 1.0)
    for k in (0, 1):
        check(wide_SV[:, 5:30], ids(4, 0, 9), k)
        check(wide_SV[:, ::2], ids(4, 0, 9), k)
        assert [len(each) for each in check(wide_SV[:0], ids(), k)] == [0] * 4
    with pytest.raises(InvariantError, match="ids must be contiguous"):
        torch.ops.toka_triton.token_logprobs(wide_SV, ids(1, 2, 3, 4, 5, 6)[::2], 1)
