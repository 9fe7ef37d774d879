"""Reference of `toka::merge_attention`: attention over disjoint sets of keys, joined by their log-sum-exps.

Legend: S parts, T tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge_attention(output_STHD: Tensor, lse_STH: Tensor) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp as if all keys had been one set; float32. A part without keys has lse -inf and counts nothing.

    Where no part has a key, the output is 0 and the log-sum-exp -inf. Source: Juravsky et al. 2024 (Hydragen), section 3.
    """
    largest_TH = lse_STH.amax(dim=0)
    safe_TH = torch.where(largest_TH == float("-inf"), 0.0, largest_TH)
    weights_STH = (lse_STH - safe_TH).exp()
    total_TH = weights_STH.sum(dim=0)
    weighted_THD = (output_STHD.nan_to_num() * weights_STH.unsqueeze(-1)).sum(dim=0)
    output_THD = torch.where(total_TH.unsqueeze(-1) > 0, weighted_THD / total_TH.unsqueeze(-1).clamp(min=1e-38), 0.0)
    return output_THD, safe_TH + total_TH.log()
