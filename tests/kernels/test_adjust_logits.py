"""adjust_logits: what the reference means, against a loop of plain Python, and the C++ kernel against the reference."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # adjusted_case lies beside the tests

from adjusted_case import BLOCK_SIZE, case, tokens_of

pytestmark = pytest.mark.usefixtures("cpp_kernels")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def slowly(arguments: tuple[Tensor | int, ...]) -> Tensor:
    """The definition, token by token."""
    logits_SV, rows_S, _, _, _, num_prompt_tokens, penalties, bias_ids, biases, bad_words, _ = arguments
    adjusted = logits_SV.float().tolist()
    for place, row in enumerate(rows_S.tolist()):
        if row < 0:
            continue
        tokens, logits = tokens_of(arguments, place).tolist(), adjusted[place]
        presence, frequency, repetition = penalties[row].tolist()
        generated = tokens[int(num_prompt_tokens[row]) :]
        for token in set(tokens):
            logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
        for token in set(generated):
            logits[token] -= frequency * generated.count(token) + presence
        for token, bias in zip(bias_ids[row].tolist(), biases[row].tolist(), strict=True):
            if token >= 0:
                logits[token] += bias
        for word in bad_words[row].tolist():
            *before, last = [token for token in word if token >= 0] or [-1]
            if last >= 0 and before == tokens[len(tokens) - len(before) :]:
                logits[last] = float("-inf")
    return torch.tensor(adjusted)


@pytest.mark.parametrize("seed", range(5))
def test_the_reference_is_the_definition(seed: int) -> None:
    arguments = case(60, seed=seed)
    adjusted = torch.ops.toka.adjust_logits(*arguments)
    torch.testing.assert_close(adjusted, slowly(arguments))
    assert torch.equal(adjusted[1], arguments[0][1]) and not torch.equal(adjusted[0], arguments[0][0])
    assert (adjusted == float("-inf")).sum() >= 6


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("vocab_size", [41, 1000, 20_000])
def test_cpp_is_the_reference(dtype: torch.dtype, vocab_size: int) -> None:
    arguments = case(vocab_size, dtype, seed=vocab_size)
    adjusted = torch.ops.toka_cpp.adjust_logits(*arguments)
    assert adjusted.dtype == torch.float32
    torch.testing.assert_close(adjusted, torch.ops.toka.adjust_logits(*arguments))


def test_rows_do_not_disturb_one_another() -> None:
    arguments = case(300, seed=1)
    together = torch.ops.toka_cpp.adjust_logits(*arguments)
    for place in range(len(together)):
        alone = (*(each[place : place + 1] for each in arguments[:3]), *arguments[3:])
        assert torch.equal(torch.ops.toka_cpp.adjust_logits(*alone)[0], together[place])


def test_a_row_that_asks_for_nothing_keeps_its_logits() -> None:
    arguments = list(case(50))
    arguments[6] = torch.tensor([[0.0, 0.0, 1.0]]).repeat(7, 1)
    arguments[7] = torch.full_like(arguments[7], -1)
    arguments[9] = torch.full_like(arguments[9], -1)
    for op in (torch.ops.toka.adjust_logits, torch.ops.toka_cpp.adjust_logits):
        assert torch.equal(op(*arguments), arguments[0])


def test_strides_and_refusals() -> None:
    arguments = list(case(50))
    arguments[0] = torch.randn(7, 100)[:, ::2]
    assert torch.equal(torch.ops.toka_cpp.adjust_logits(*arguments), torch.ops.toka.adjust_logits(*arguments))
    with pytest.raises(RuntimeError, match="agree in their first dimension"):
        torch.ops.toka_cpp.adjust_logits(arguments[0], arguments[1][:3], *arguments[2:])
    with pytest.raises(RuntimeError, match="block_size"):
        torch.ops.toka_cpp.adjust_logits(*arguments[:-1], 0)
    assert arguments[-1] == BLOCK_SIZE
