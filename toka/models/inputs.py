"""What a step hands to a model besides the token ids.

Legend: T tokens of the step (padded to its bucket), R rows of the step (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

KVCache = tuple[Tensor, Tensor]
"""(key_cache, value_cache) of one layer, each [num_blocks, num_kv_heads, block_size, head_dim]."""

KVCaches = Sequence[KVCache]


class ForwardInputs(NamedTuple):
    """Where the tokens of a step stand and what they may see; a pytree of tensors, so that it can be traced.

    positions_T: position of each token in its request, int32 or int64; 0 for padding.
    slots_T: where each token's key and value go, block * block_size + offset, int32; -1 for padding.
    block_table: blocks of every row, int32 [max_rows, max_blocks].
    rows_R: the rows of the step, int32; -1 for padding.
    query_start: row i owns tokens query_start[i] .. query_start[i + 1] - 1, int32 [R + 1].
    seq_lens_R: tokens of each row in the cache once the step has written its keys, int32.
    shared_groups_G5, shared_members_N, shared_lens_X: which rows share a prefix, int32, as in kernels/op_schema.py; None = nothing known.
    """

    positions_T: Tensor
    slots_T: Tensor
    block_table: Tensor
    rows_R: Tensor
    query_start: Tensor
    seq_lens_R: Tensor
    shared_groups_G5: Tensor | None = None
    shared_members_N: Tensor | None = None
    shared_lens_X: Tensor | None = None
