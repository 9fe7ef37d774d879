"""Reference of `toka::encoder_attention`: each row by itself, every token sees all of its row, softmax in float32.

Legend: T tokens, H heads, D head dim, L tokens of one row.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def encoder_attention(
    query_THD: Tensor, key_THD: Tensor, value_THD: Tensor, query_start: Tensor, scale: float
) -> Tensor:
    """Bidirectional attention within rows; shapes and dtypes as in op_schema.py. Tokens that no row owns get zeros."""
    out_THD = query_THD.new_zeros(query_THD.shape)
    starts = query_start.tolist()
    for begin, end in itertools.pairwise(starts):
        if begin == end:
            continue
        query_LHD, key_LHD, value_LHD = (each[begin:end].float() for each in (query_THD, key_THD, value_THD))
        weights_HLL = (torch.einsum("qhd,lhd->hql", query_LHD, key_LHD) * scale).softmax(dim=-1)
        out_THD[begin:end] = torch.einsum("hql,lhd->qhd", weights_HLL, value_LHD).to(query_THD.dtype)
    return out_THD
