"""Rows with penalties, biases and bad words, for the tests of toka's adjust_logits.

Legend: S places, V vocabulary, M rows of the tables.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZE, NUM_BLOCKS, BLOCKS_PER_ROW, MAX_ROWS = 8, 96, 12, 7


def case(vocab_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor | int, ...]:
    """Arguments of the operator: places in any order, one of them padded, rows of 0 to 90 tokens, many of them the same."""
    random = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=random, dtype=torch.int32)

    rows_S = torch.tensor([3, -1, 0, 6, 1, 2, 5], dtype=torch.int32)
    seq_lens_S = torch.tensor([90, 4, 1, 17, 64, 8, 33], dtype=torch.int32)
    block_table = torch.randperm(NUM_BLOCKS, generator=random, dtype=torch.int32)[: MAX_ROWS * BLOCKS_PER_ROW]
    token_of_slot = ints(0, min(vocab_size, 40), NUM_BLOCKS * BLOCK_SIZE + 1)
    penalties = torch.rand(MAX_ROWS, 3, generator=random) * 2
    penalties[0] = torch.tensor([0.0, 0.0, 1.0])
    penalties[1, 2] = 1.0
    bias_ids = torch.full((MAX_ROWS, 20), -1, dtype=torch.int32)
    for row in range(1, MAX_ROWS):
        ids = torch.randperm(vocab_size, generator=random)[: 3 * row]
        bias_ids[row, : len(ids)] = ids.int()
    bad_words = torch.full((MAX_ROWS, 6, 4), -1, dtype=torch.int32)
    bad_words[:, 0, 3] = ints(0, vocab_size, MAX_ROWS)  # of one token
    bad_words[:, 1, 2:] = ints(0, min(vocab_size, 3), MAX_ROWS, 2)
    bad_words[:, 2] = ints(0, vocab_size, MAX_ROWS, 4)
    case = (
        (torch.randn(len(rows_S), vocab_size, generator=random) * 4).to(dtype),
        rows_S,
        seq_lens_S,
        token_of_slot,
        block_table.view(MAX_ROWS, BLOCKS_PER_ROW),
        torch.tensor([0, 70, 4, 30, 9, 33, 10], dtype=torch.int32),
        penalties,
        bias_ids,
        torch.randn(bias_ids.shape, generator=random) * 10,
        bad_words,
        BLOCK_SIZE,
    )
    for place, row in enumerate(rows_S.tolist()):
        if row > 1:  # a word whose beginning has just been said
            bad_words[row, 3, 1:3] = tokens_of(case, place)[-2:]
            bad_words[row, 3, 3] = row % vocab_size
    return case


def tokens_of(case: tuple[Tensor | int, ...], place: int) -> Tensor:
    """The tokens of the row at this place."""
    _, rows_S, seq_lens_S, token_of_slot, block_table, *_ = case
    position = torch.arange(int(seq_lens_S[place]))
    return token_of_slot[block_table[int(rows_S[place]), position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE]
