"""Penalties, biases and bad words in Triton: the reference's logits, however the vocabulary is cut."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(
    0, str(Path(__file__).parents[1])
)  # adjusted_case lies there, and tests/gpu runs this file without any conftest

from adjusted_case import case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [41, 2048, 2049])
def test_same_as_the_reference(dtype: torch.dtype, vocab_size: int) -> None:
    arguments = case(vocab_size, dtype, seed=vocab_size)
    adjusted = torch.ops.toka_triton.adjust_logits(*arguments)
    assert adjusted.dtype == torch.float32
    torch.testing.assert_close(adjusted, torch.ops.toka.adjust_logits(*arguments))


def test_strides_and_no_place() -> None:
    arguments = list(case(50))
    arguments[0] = torch.randn(7, 100)[:, ::2]
    expected = torch.ops.toka.adjust_logits(*arguments)
    torch.testing.assert_close(torch.ops.toka_triton.adjust_logits(*arguments), expected)
    none = torch.ops.toka_triton.adjust_logits(*(each[:0] for each in arguments[:3]), *arguments[3:])
    assert none.shape == (0, 50)
