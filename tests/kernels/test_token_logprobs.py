"""Logprobs of tokens: every implementation for CPUs against the reference, and that against torch's log_softmax.

Legend: S places, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from toka.kernels.registry import FLOATS, Implementation, implementations

pytestmark = pytest.mark.usefixtures("cpp_kernels")

ALL = [i for i in implementations("token_logprobs") if i.family != "triton"]
FAST = [i for i in ALL if i.family != "reference"]
NAN, INF = float("nan"), float("inf")

every = pytest.mark.parametrize("implementation", ALL, ids=lambda i: i.family)
every_fast = pytest.mark.parametrize("implementation", FAST, ids=lambda i: i.family)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def logits(num_places: int, vocab_size: int, spread: float, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(vocab_size)
    return (torch.randn(num_places, vocab_size, generator=random) * spread).to(dtype)


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
    for place in (1, 2):  # rank, top ids
        assert torch.equal(got[place], expected[place])
    for place in (0, 3):
        assert torch.equal(got[place] == -INF, expected[place] == -INF)
        torch.testing.assert_close(got[place], expected[place], atol=2e-5, rtol=1e-6)


@every_fast
@pytest.mark.parametrize("vocab_size", [1, 5, 63, 64, 65, 1000, 49_155])
@pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=str)
@pytest.mark.parametrize("spread", [0.01, 4.0, 60.0])
def test_same_as_the_reference(
    implementation: Implementation, vocab_size: int, dtype: torch.dtype, spread: float
) -> None:
    logits_SV = logits(6, vocab_size, spread, dtype)
    wanted = ids(0, vocab_size - 1, -1, vocab_size // 2, int(logits_SV[4].argmax()), int(logits_SV[5].argmin()))
    expected = torch.ops.toka.token_logprobs(logits_SV, wanted, 20)
    assert_same(implementation.overload(logits_SV, wanted, 20), expected)


@every
def test_values_are_those_of_log_softmax(implementation: Implementation) -> None:
    logits_SV = logits(4, 777, 3.0)
    expected_SV = logits_SV.double().log_softmax(1).float()
    wanted = ids(3, 776, 0, 99)
    logprob, rank, top_ids, top_logprobs = implementation.overload(logits_SV, wanted, 5)
    torch.testing.assert_close(logprob, expected_SV.gather(1, wanted[:, None].long())[:, 0], atol=1e-5, rtol=0.0)
    torch.testing.assert_close(top_logprobs, expected_SV.topk(5).values, atol=1e-5, rtol=0.0)
    assert torch.equal(top_ids.long(), expected_SV.topk(5).indices)
    assert rank.tolist() == [1 + int((row > row[token]).sum()) for row, token in zip(logits_SV, wanted, strict=True)]


@every
def test_a_token_has_one_value_to_the_bit(implementation: Implementation) -> None:
    """Clients compare a token's logprob with those of the likeliest by float equality."""
    logits_SV = logits(200, 5000, 2.0)
    best = logits_SV.argmax(1).int()
    logprob, rank, top_ids, top_logprobs = implementation.overload(logits_SV, best, 3)
    assert rank.tolist() == [1] * 200 and torch.equal(top_ids[:, 0], best)
    assert torch.equal(logprob, top_logprobs[:, 0])
    logprob, rank, _, _ = implementation.overload(logits_SV, top_ids[:, 2].contiguous(), 3)
    assert torch.equal(logprob, top_logprobs[:, 2]) and rank.tolist() == [3] * 200


@every
def test_equals_come_in_the_order_of_their_ids(implementation: Implementation) -> None:
    logits_SV = torch.zeros(3, 300)
    logits_SV[0, ::3] = -0.0
    logits_SV[1, 200::50] = 1.0
    logits_SV[2] = logits(1, 300, 1.0).round()
    logprob, rank, top_ids, top_logprobs = implementation.overload(logits_SV, ids(70, 250, 299), 4)
    assert top_ids[0].tolist() == [0, 1, 2, 3] and top_ids[1].tolist() == [200, 250, 0, 1]
    assert rank.tolist()[:2] == [71, 2]
    assert_same((logprob, rank, top_ids, top_logprobs), torch.ops.toka.token_logprobs(logits_SV, ids(70, 250, 299), 4))


@every
def test_broken_logits(implementation: Implementation) -> None:
    """NaN counts as -inf, +inf as the largest finite float; a row of nothing but -inf has no likely token and no NaN."""
    logits_SV = torch.tensor(
        [[NAN, 0.0, -INF, 0.0], [INF, 1.0, INF, 2.0], [-INF] * 4, [NAN] * 4, [-INF, -INF, -INF, 3.0]]
    )
    logprob, rank, top_ids, top_logprobs = implementation.overload(logits_SV, ids(1, 2, 3, 0, 0), 3)
    half = torch.tensor(0.5).log().item()
    assert logprob.tolist()[:2] == pytest.approx([half, half])
    assert logprob.tolist()[2:] == [-INF, -INF, -INF]
    assert rank.tolist() == [1, 2, 4, 1, 2]
    assert top_ids.tolist() == [[1, 3, 0], [0, 2, 3], [0, 1, 2], [0, 1, 2], [3, 0, 1]]
    assert top_logprobs[4].tolist() == [0.0, -INF, -INF]
    assert not any(tensor.isnan().any() for tensor in (logprob, top_logprobs))


@every
def test_places_that_ask_for_nothing_and_small_vocabularies(implementation: Implementation) -> None:
    logprob, rank, top_ids, top_logprobs = implementation.overload(logits(2, 3, 1.0), ids(-1, 2), 5)
    assert (float(logprob[0]), int(rank[0]), top_ids[0].tolist()) == (-INF, 0, [-1] * 5)
    assert top_logprobs[0].tolist() == [-INF] * 5
    assert sorted(top_ids[1].tolist()) == [-1, -1, 0, 1, 2] and top_logprobs[1, 3:].tolist() == [-INF, -INF]


@every
@pytest.mark.parametrize("k", [0, 1])
def test_few_likeliest_strides_and_no_place(implementation: Implementation, k: int) -> None:
    wide_SV = logits(3, 40, 1.0)
    for each_SV in (wide_SV[:, 5:30], wide_SV[:, ::2]):
        expected = torch.ops.toka.token_logprobs(each_SV.contiguous(), ids(4, 0, 9), k)
        assert_same(implementation.overload(each_SV, ids(4, 0, 9), k), expected)
    assert [each.shape[0] for each in implementation.overload(wide_SV[:0], ids(), k)] == [0] * 4


@every_fast
def test_a_row_alone_is_the_row_among_others(implementation: Implementation) -> None:
    logits_SV = logits(40, 20_000, 3.0)
    wanted = torch.arange(40, dtype=torch.int32)
    together = implementation.overload(logits_SV, wanted, 20)
    for row in (0, 17, 39):
        alone = implementation.overload(logits_SV[row : row + 1], wanted[row : row + 1], 20)
        assert all(torch.equal(one[0], many[row]) for one, many in zip(alone, together, strict=True))


def test_what_the_fast_kernels_refuse() -> None:
    with pytest.raises(RuntimeError, match="id 9 is outside of the vocabulary"):
        torch.ops.toka_cpp.token_logprobs(logits(1, 9, 1.0), ids(9), 1)
    with pytest.raises(RuntimeError, match="k must be from 0 to 64, is 65"):
        torch.ops.toka_cpp.token_logprobs(logits(1, 9, 1.0), ids(0), 65)
