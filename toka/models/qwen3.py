"""Qwen3 (dense): every query and key head goes through an RMSNorm before the rope; head_dim is stated, not derived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from toka.models.decoder import CausalLM
from toka.models.llama import Llama
from toka.placement import PlacementTable, Replicate


class Qwen3(CausalLM):
    """The plain decoder with q/k norms, whose weights are of one head's size and so the same on all ranks."""

    PLACEMENT: ClassVar[PlacementTable] = {
        **Llama.PLACEMENT,
        "layers.*.self_attn.q_norm.weight": {"tp": Replicate()},
        "layers.*.self_attn.k_norm.weight": {"tp": Replicate()},
    }
    HF_NAMES: ClassVar[Mapping[str, str]] = Llama.HF_NAMES
