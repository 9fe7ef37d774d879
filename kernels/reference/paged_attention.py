"""Reference of `toka::paged_attention`: each row by itself, all its keys at once, softmax in float32.

Legend: T tokens, H query heads, K KV heads, G query heads a KV head, D head dim, Q queries of one row, L cached tokens of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    query_THD: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    rows_R: Tensor,
    query_start: Tensor,
    seq_lens_R: Tensor,
    scale: float,
    sliding_window: int,
    shared_groups: Tensor | None = None,
    shared_members: Tensor | None = None,
    shared_lens: Tensor | None = None,
) -> Tensor:
    """Causal attention over the paged cache; shapes and dtypes as in op_schema.py. Tokens that no row owns get zeros.

    What rows share is not used here: it says how attention may be computed, not what.
    """
    out_THD = query_THD.new_zeros(query_THD.shape)
    starts = query_start.tolist()
    for i, (row, seq_len) in enumerate(zip(rows_R.tolist(), seq_lens_R.tolist(), strict=True)):
        begin, end = starts[i], starts[i + 1]
        if row < 0 or begin == end:
            continue
        out_THD[begin:end] = _attend_row(
            query_THD[begin:end].float(),
            _gather(key_cache, block_table[row], seq_len),
            _gather(value_cache, block_table[row], seq_len),
            scale,
            sliding_window,
        ).to(query_THD.dtype)
    return out_THD


def _gather(cache: Tensor, blocks: Tensor, seq_len: int) -> Tensor:
    """The first seq_len tokens of one row, float32 [L, K, D]; cache is [num_blocks, K, block_size, D]."""
    _, num_kv_heads, block_size, head_dim = cache.shape
    used = blocks[: -(-seq_len // block_size)].long()
    return cache[used].transpose(1, 2).reshape(-1, num_kv_heads, head_dim)[:seq_len].float()


def _attend_row(query_QHD: Tensor, key_LKD: Tensor, value_LKD: Tensor, scale: float, sliding_window: int) -> Tensor:
    num_queries, num_heads, head_dim = query_QHD.shape
    seq_len, num_kv_heads, _ = key_LKD.shape
    query_QKGD = query_QHD.reshape(num_queries, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores_KGQL = torch.einsum("qkgd,lkd->kgql", query_QKGD, key_LKD) * scale

    position_Q1 = torch.arange(seq_len - num_queries, seq_len, device=query_QHD.device)[:, None]
    position_L = torch.arange(seq_len, device=query_QHD.device)
    seen_QL = position_L <= position_Q1
    if sliding_window > 0:
        seen_QL &= position_L > position_Q1 - sliding_window

    weights_KGQL = scores_KGQL.masked_fill(~seen_QL, float("-inf")).softmax(dim=-1)
    return torch.einsum("kgql,lkd->qkgd", weights_KGQL, value_LKD).reshape(num_queries, num_heads, head_dim)
