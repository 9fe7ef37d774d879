"""Reference of `toka::rope_write_kv`: turn queries and keys, then scatter keys and values into the paged cache.

Legend: T tokens, H heads, D head dim, F = D / 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toka.kernels.reference.write_kv import write_kv


def rope_write_kv(
    query_THD: Tensor,
    key_THD: Tensor,
    value_THD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Shapes and dtypes as in op_schema.py; padded tokens are turned too, and not written."""
    write_kv(_rotate(key_THD, cos_TF, sin_TF), value_THD, key_cache, value_cache, slots_T)
    return _rotate(query_THD, cos_TF, sin_TF)


def _rotate(x_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    cos_T1F, sin_T1F = cos_TF.unsqueeze(1), sin_TF.unsqueeze(1)
    first_THF, second_THF = x_THD.chunk(2, dim=-1)
    return torch.cat((first_THF * cos_T1F - second_THF * sin_T1F, second_THF * cos_T1F + first_THF * sin_T1F), dim=-1)
