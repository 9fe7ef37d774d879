"""What adjusts the logits of requests that begin, as arrays: penalties, biases, bad words, and the tokens that are cached already."""

from __future__ import annotations

import numpy as np

from toka.params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LOGIT_BIASES
from toka.plan import I32, I64, AdjustmentSettings
from toka.scheduler.batching import Chunk
from toka.scheduler.request import Request
from toka.scheduler.request_table import RequestTable


def adjustments_of(
    admitted: list[tuple[int, Request]], chunks: list[Chunk], table: RequestTable
) -> AdjustmentSettings | None:
    """Of requests that get these rows in a step with these chunks; None if none of them asks for any."""
    asking = [(row, request) for row, request in admitted if request.sampling.adjusts_logits]
    if not asking:
        return None
    rows = [row for row, _ in asking]
    bias_ids = np.full((len(rows), MAX_LOGIT_BIASES), -1, dtype=np.int32)
    biases = np.zeros((len(rows), MAX_LOGIT_BIASES), dtype=np.float32)
    bad_words = np.full((len(rows), MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, dtype=np.int32)
    for i, (_, request) in enumerate(asking):
        for place, (token, bias) in enumerate(request.sampling.logit_bias):
            bias_ids[i, place], biases[i, place] = token, bias
        for place, word in enumerate(request.sampling.bad_words):
            bad_words[i, place, -len(word) :] = word
    starts = {chunk.row: chunk.start for chunk in chunks}
    sampling = [request.sampling for _, request in asking]
    penalties = [(s.presence_penalty, s.frequency_penalty, s.repetition_penalty) for s in sampling]
    return AdjustmentSettings(
        rows=np.array(rows, dtype=np.int32),
        num_prompt_tokens=np.array([request.num_prompt_tokens for _, request in asking], dtype=np.int32),
        penalties=np.array(penalties, dtype=np.float32),
        bias_ids=bias_ids,
        biases=biases,
        bad_words=bad_words,
        cached_slots=np.concatenate([_slots(row, starts[row], table) for row in rows]),
        cached_tokens=np.concatenate([_tokens(row, starts[row], table) for row in rows]),
    )


def _slots(row: int, num_tokens: int, table: RequestTable) -> I64:
    """Where the row's first tokens stand in the KV cache."""
    positions = np.arange(num_tokens, dtype=np.int64)
    slots: I64 = table.blocks[row, positions // table.block_size].astype(np.int64) * table.block_size
    slots += positions % table.block_size
    return slots


def _tokens(row: int, num_tokens: int, table: RequestTable) -> I32:
    """The row's first tokens, which the host knows since they were computed."""
    tokens: I32 = table.tokens[row, :num_tokens].copy()
    return tokens
