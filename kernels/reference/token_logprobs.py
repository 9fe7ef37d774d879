"""Reference of `toka::token_logprobs`: how likely a token was and which were likeliest, of softmax(logits) as the model gave them.

NaN counts as -inf and +inf as the largest finite float, as in the sampler. Legend: S places, V vocabulary, K likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LARGEST = torch.finfo(torch.float32).max
_NOTHING = float("-inf")


def token_logprobs(logits_SV: Tensor, ids_S: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprob and rank of ids_S, ids and logprobs of the k likeliest. See op_schema.py."""
    num_places, vocab_size = logits_SV.shape
    logits_SV = torch.nan_to_num(logits_SV.float(), nan=_NOTHING, posinf=_LARGEST, neginf=_NOTHING)
    largest_S1 = logits_SV.amax(1, keepdim=True)
    largest_S1 = torch.where(largest_S1 == _NOTHING, 0.0, largest_S1)
    shifted_SV = logits_SV - largest_S1
    sum_S1 = shifted_SV.double().exp().sum(1, keepdim=True)
    log_sum_S1 = torch.where(sum_S1 == 0.0, 0.0, sum_S1.log()).float()
    logprobs_SV = shifted_SV - log_sum_S1

    order_SV = torch.argsort(logits_SV, dim=1, descending=True, stable=True)  # of equals the lowest id comes first
    num_top = min(k, vocab_size)
    top_ids_SK = torch.full((num_places, k), -1, dtype=torch.int32, device=logits_SV.device)
    top_ids_SK[:, :num_top] = order_SV[:, :num_top]
    top_logprobs_SK = torch.full((num_places, k), _NOTHING, device=logits_SV.device)
    top_logprobs_SK[:, :num_top] = logprobs_SV.gather(1, order_SV[:, :num_top])

    is_wanted_S = ids_S >= 0
    ids_S1 = ids_S.clamp(min=0).long()[:, None]
    logprob_S = torch.where(is_wanted_S, logprobs_SV.gather(1, ids_S1)[:, 0], _NOTHING)
    rank_S = torch.where(is_wanted_S, 1 + (order_SV == ids_S1).int().argmax(1), 0).int()
    top_ids_SK[~is_wanted_S] = -1
    top_logprobs_SK[~is_wanted_S] = _NOTHING
    return logprob_S, rank_S, top_ids_SK, top_logprobs_SK
