"""Grouped-query attention over the paged KV cache.

Legend: T tokens, C hidden size, H query heads, K KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import toka.kernels.ops  # noqa: F401 (registers torch.ops.toka)
from toka.models.inputs import ForwardInputs, KVCache
from toka.models.linear import Linear
from toka.models.norm import RMSNorm
from toka.models.rope import Rope
from toka.models.spec import ModelSpec


class Attention(nn.Module):
    """Projections, rope, write into the cache, attention over it. With spec.qk_norm each query and key head is normalised first.

    sliding_window: tokens that a token sees, itself included; 0 = all before it. The number of heads is read off the projections'
    outputs, so that the block is the same whether it holds all heads or a rank's share.
    """

    def __init__(self, spec: ModelSpec, sliding_window: int, dtype: torch.dtype):
        super().__init__()
        query_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(spec.hidden_size, query_size, spec.qkv_bias, dtype)
        self.k_proj = Linear(spec.hidden_size, kv_size, spec.qkv_bias, dtype)
        self.v_proj = Linear(spec.hidden_size, kv_size, spec.qkv_bias, dtype)
        self.o_proj = Linear(query_size, spec.hidden_size, spec.output_bias, dtype)
        self.q_norm = RMSNorm(spec.head_dim, spec.norm_eps, dtype) if spec.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, spec.norm_eps, dtype) if spec.qk_norm else None
        self.head_dim, self.sliding_window = spec.head_dim, sliding_window
        self.scale = spec.head_dim**-0.5

    def forward(self, hidden_TC: Tensor, rope: Rope, inputs: ForwardInputs, kv_cache: KVCache) -> Tensor:
        query_THD = self.q_proj(hidden_TC).unflatten(-1, (-1, self.head_dim))
        key_TKD = self.k_proj(hidden_TC).unflatten(-1, (-1, self.head_dim))
        value_TKD = self.v_proj(hidden_TC).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query_THD, key_TKD = self.q_norm(query_THD), self.k_norm(key_TKD)
        query_THD, key_TKD = rope.rotate(query_THD), rope.rotate(key_TKD)
        key_cache, value_cache = kv_cache
        torch.ops.toka.write_kv(key_TKD, value_TKD, key_cache, value_cache, inputs.slots_T)
        attended_THD = torch.ops.toka.paged_attention(
            query_THD,
            key_cache,
            value_cache,
            inputs.block_table,
            inputs.rows_R,
            inputs.query_start,
            inputs.seq_lens_R,
            self.scale,
            self.sliding_window,
            inputs.shared_groups_G5,
            inputs.shared_members_N,
            inputs.shared_lens_X,
        )
        output_TC: Tensor = self.o_proj(attended_THD.flatten(1))
        return output_TC
