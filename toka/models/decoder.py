"""The decoder that the families are made of. A family adds to it where its weights live and what checkpoints call them.

Legend: T tokens, R rows, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from toka.models.attention import Attention
from toka.models.embedding import Embedding
from toka.models.inputs import ForwardInputs, KVCache, KVCaches
from toka.models.linear import Linear
from toka.models.mlp import GatedMLP
from toka.models.norm import RMSNorm
from toka.models.rope import Rope, RotaryEmbedding
from toka.models.spec import ModelSpec
from toka.placement import PlacementTable


class DecoderLayer(nn.Module):
    """A pre-norm block: attention, then the MLP, each added to the residual stream.

    Nothing in its graph depends on its index: layers of the same `kind` whose weights have the same formats differ in their weights and
    caches only, so that the compiler can compile one of them and share it.
    """

    def __init__(self, spec: ModelSpec, sliding_window: int, dtype: torch.dtype):
        super().__init__()
        self.input_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.self_attn = Attention(spec, sliding_window, dtype)
        self.post_attention_layernorm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
        self.mlp = GatedMLP(spec, dtype)
        self.kind = f"sliding_{sliding_window}" if sliding_window else "full"

    def forward(self, hidden_TC: Tensor, rope: Rope, inputs: ForwardInputs, kv_cache: KVCache) -> Tensor:
        attended_TC: Tensor = self.self_attn(self.input_layernorm(hidden_TC), rope, inputs, kv_cache)
        hidden_TC = hidden_TC + attended_TC
        mixed_TC: Tensor = self.mlp(self.post_attention_layernorm(hidden_TC))
        return hidden_TC + mixed_TC


class CausalLM(nn.Module):
    """Token ids → hidden states → logits, over a paged KV cache that the caller owns.

    PLACEMENT: where each weight lives on a mesh. HF_NAMES: first part of our weight names → the part in Hugging Face checkpoints.
    """

    PLACEMENT: ClassVar[PlacementTable]
    HF_NAMES: ClassVar[Mapping[str, str]]

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, *, with_head: bool = True):
        super().__init__()
        self.spec = spec
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size, dtype)
        self.rotary_emb = RotaryEmbedding(spec.rope, spec.head_dim, dtype)
        self.layers = nn.ModuleList(DecoderLayer(spec, window, dtype) for window in spec.sliding_windows)
        self.norm = RMSNorm(spec.hidden_size, spec.norm_eps, dtype)
        has_own_head = with_head and not spec.tied_head
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size, False, dtype) if has_own_head else None
        self._is_headless, self._prefix = not with_head, "model."

    def forward(self, token_ids_T: Tensor, inputs: ForwardInputs, kv_caches: KVCaches) -> Tensor:
        """Hidden states after the final norm, [T, C]; writes the tokens' keys and values into the caches (one pair a layer).

        token_ids_T: int32 or int64; padding may hold any valid id.
        """
        hidden_TC: Tensor = self.embed_tokens(token_ids_T)
        rope = self.rotary_emb(inputs.positions_T)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden_TC = layer(hidden_TC, rope, inputs, kv_cache)
        normed_TC: Tensor = self.norm(hidden_TC)
        return normed_TC

    def logits(self, hidden_RC: Tensor) -> Tensor:
        """Logits of the next token in the model's dtype, [R, V]; hidden_RC: rows of what `forward` returned."""
        logits_RV: Tensor = self.embed_tokens.logits(hidden_RC) if self.lm_head is None else self.lm_head(hidden_RC)
        return logits_RV

    def look_at(self, names: Collection[str]) -> None:
        """Told the names of a checkpoint's tensors: one that was saved without its head may leave out the first part of them."""
        self._prefix = "model." if any(name.startswith("model.") for name in names) else ""

    def checkpoint_name(self, weight: str) -> str:
        """Hugging Face's name of one of our weights."""
        first, _, rest = weight.partition(".")
        return f"{self.HF_NAMES[first].replace('model.', self._prefix)}.{rest}"

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor without our using it."""
        return self._is_headless and name == f"{self.HF_NAMES['lm_head']}.weight"

    def duplicate_of(self, name: str) -> str | None:
        """The embedding's checkpoint name if `name` is that of the head and the head is tied to it."""
        is_head = name == f"{self.HF_NAMES['lm_head']}.weight"
        return self.checkpoint_name("embed_tokens.weight") if is_head and self.spec.tied_head else None
