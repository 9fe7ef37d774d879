"""Reference of `toka::sample`: each row by itself, with a full sort.

Order of the filters: mask and held-back ids, temperature, top_k, top_p over what top_k left, min_p, then one draw by inverse CDF over the
kept tokens in the order of their ids. NaN and -inf logits can't be drawn, +inf counts as the largest finite float. A row in which
nothing can be drawn gives the lowest id that is allowed: that the mask allows and that is not held back; failing that, that the mask
allows; failing that, 0.

Legend: R rows, V vocabulary, K masks, W words of a mask, N tokens that can be drawn, in descending order of logit, equals in ascending
order of id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toka.kernels.reference.counter_hash import uniform

_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny  # its reciprocal is still finite


def sample(
    logits_RV: Tensor,
    rows_R: Tensor,
    seq_lens_R: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    held_back_ids: Tensor,
    held_back_until: Tensor,
    last_token: Tensor,
    masks_KW: Tensor | None = None,
    mask_of_R: Tensor | None = None,
) -> Tensor:
    """One token id a row, int32 [R]; also sets last_token[row]. Padded rows give 0 and set nothing. See op_schema.py."""
    sampled_R = torch.zeros_like(rows_R, dtype=torch.int32)
    for i, row in enumerate(rows_R.tolist()):
        if row < 0:
            continue
        logits_V = _drawable(logits_RV[i])
        masked_V = allowed_V = _in_mask(masks_KW, mask_of_R, i, logits_V)
        if int(seq_lens_R[i]) < int(held_back_until[row]):
            held = held_back_ids[row][(held_back_ids[row] >= 0) & (held_back_ids[row] < len(logits_V))].long()
            allowed_V = masked_V.clone()
            allowed_V[held] = False
        logits_V[~allowed_V] = float("-inf")
        if bool((logits_V == float("-inf")).all()):
            token = int(
                (allowed_V if allowed_V.any() else masked_V).int().argmax()
            )  # the first that is allowed, else 0
        elif float(temperature[row]) == 0.0:
            token = int(logits_V.argmax())  # the first of equals
        else:
            token = _draw(
                logits_V,
                temperature[row],
                int(top_k[row]),
                float(top_p[row]),
                min_p[row],
                float(uniform(seed[row], seq_lens_R[i])),
            )
        sampled_R[i] = token
        last_token[row] = token
    return sampled_R


def _drawable(logits_V: Tensor) -> Tensor:
    """A float32 copy without NaN or +inf."""
    return torch.nan_to_num(logits_V.float(), nan=float("-inf"), posinf=_LARGEST, neginf=float("-inf"))


def _in_mask(masks_KW: Tensor | None, mask_of_R: Tensor | None, i: int, logits_V: Tensor) -> Tensor:
    """Which tokens the mask of place i allows; bool [V]."""
    if masks_KW is None or mask_of_R is None or int(mask_of_R[i]) < 0:
        return torch.ones_like(logits_V, dtype=torch.bool)
    bits_W32 = (masks_KW[int(mask_of_R[i])][:, None] >> torch.arange(32, device=masks_KW.device)) & 1
    return bits_W32.reshape(-1)[: len(logits_V)].bool()


def _draw(logits_V: Tensor, temperature: Tensor, top_k: int, top_p: float, min_p: Tensor, u: float) -> int:
    """Filter and draw. Weights are probabilities up to a factor: the likeliest token weighs 1. Sums are taken in float64."""
    weight_V = torch.exp((logits_V - logits_V.max()) * (1.0 / temperature.clamp(min=_SMALLEST)))
    order_N = torch.argsort(logits_V, descending=True, stable=True)
    if top_k > 0:
        order_N = order_N[:top_k]
    if top_p < 1.0:
        mass_N = weight_V[order_N].double().cumsum(0)
        # The first place where the mass is reached is kept too.
        num_kept = 1 + int((mass_N < top_p * mass_N[-1]).sum())
        order_N = order_N[:num_kept]
    kept_V = torch.zeros_like(weight_V)
    kept_V[order_N] = torch.where(weight_V[order_N] < min_p, 0.0, weight_V[order_N])

    mass_V = kept_V.double().cumsum(0)
    token = int(torch.searchsorted(mass_V, u * mass_V[-1], right=True))
    return min(token, int(kept_V.nonzero()[-1]))
