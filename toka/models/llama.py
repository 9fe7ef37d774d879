"""Llama 2 and 3, SmolLM2, Mistral, and Qwen2: they differ in biases, rope and sliding windows, which the spec says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from toka.models.decoder import CausalLM
from toka.placement import PlacementTable, Replicate, Shard


class Llama(CausalLM):
    """The plain decoder. Along the mesh axis "tp" the heads, the MLP's inner features and the vocabulary are cut."""

    PLACEMENT: ClassVar[PlacementTable] = {
        "embed_tokens.weight": {"tp": Shard(0)},
        "layers.*.input_layernorm.weight": {"tp": Replicate()},
        "layers.*.self_attn.q_proj.*": {"tp": Shard(0)},
        "layers.*.self_attn.k_proj.*": {"tp": Shard(0)},
        "layers.*.self_attn.v_proj.*": {"tp": Shard(0)},
        "layers.*.self_attn.o_proj.weight": {"tp": Shard(1)},
        "layers.*.self_attn.o_proj.bias": {"tp": Replicate()},
        "layers.*.post_attention_layernorm.weight": {"tp": Replicate()},
        "layers.*.mlp.gate_proj.*": {"tp": Shard(0)},
        "layers.*.mlp.up_proj.*": {"tp": Shard(0)},
        "layers.*.mlp.down_proj.weight": {"tp": Shard(1)},
        "layers.*.mlp.down_proj.bias": {"tp": Replicate()},
        "norm.weight": {"tp": Replicate()},
        "lm_head.weight": {"tp": Shard(0)},
    }
    HF_NAMES: ClassVar[Mapping[str, str]] = {
        "embed_tokens": "model.embed_tokens",
        "layers": "model.layers",
        "norm": "model.norm",
        "lm_head": "lm_head",
    }
