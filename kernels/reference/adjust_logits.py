"""Reference of `toka::adjust_logits`: penalties for tokens that were there, biases, and words that must not come.

In this order, for a token t that stands p times in the prompt and g times in what was generated:
repetition penalty r (https://arxiv.org/abs/1909.05858), if p + g > 0: logit / r where it is positive, else logit * r;
frequency penalty f and presence penalty q, as in OpenAI's API: logit - f * g - (q if g > 0);
its bias is added; and where the tokens before it and itself would make a bad word, -inf.

Legend: S places, V vocabulary, L tokens of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def adjust_logits(
    logits_SV: Tensor,
    rows_S: Tensor,
    seq_lens_S: Tensor,
    token_of_slot: Tensor,
    block_table: Tensor,
    num_prompt_tokens: Tensor,
    penalties: Tensor,
    bias_ids: Tensor,
    biases: Tensor,
    bad_words: Tensor,
    block_size: int,
) -> Tensor:
    """Adjusted logits, float32 [S, V]. See op_schema.py."""
    adjusted_SV = logits_SV.to(torch.float32, copy=True)
    for logits_V, row, length in zip(adjusted_SV, rows_S.tolist(), seq_lens_S.tolist(), strict=True):
        if row < 0:
            continue
        positions_L = torch.arange(length, device=block_table.device)
        slots_L = block_table[row, positions_L // block_size].long() * block_size + positions_L % block_size
        tokens_L = token_of_slot[slots_L].long()
        _penalise(logits_V, tokens_L, int(num_prompt_tokens[row]), penalties[row])
        is_used = bias_ids[row] >= 0
        logits_V[bias_ids[row][is_used].long()] += biases[row][is_used]
        for filled in bad_words[row].tolist():
            word = [token for token in filled if token >= 0]
            num_before = len(word) - 1
            if 0 <= num_before <= length and tokens_L[length - num_before :].tolist() == word[:-1]:
                logits_V[word[-1]] = float("-inf")
    return adjusted_SV


def _penalise(logits_V: Tensor, tokens_L: Tensor, num_prompt_tokens: int, penalties: Tensor) -> None:
    presence, frequency, repetition = penalties.unbind()
    seen_V = torch.bincount(tokens_L, minlength=len(logits_V)) > 0
    generated_V = torch.bincount(tokens_L[num_prompt_tokens:], minlength=len(logits_V))
    repeated_V = torch.where(logits_V > 0, logits_V / repetition, logits_V * repetition)
    logits_V.copy_(torch.where(seen_V, repeated_V, logits_V))
    logits_V -= frequency * generated_V + presence * (generated_V > 0)
