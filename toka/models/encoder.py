"""Encoders: BERT, RoBERTa and XLM-R, which differ in where positions begin and in what their checkpoints call the classification head.

Legend: T tokens, R rows, S rows of the step that are wanted, C hidden size, I intermediate size, H heads, D head dim, L labels.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor, nn

import toka.kernels.ops  # noqa: F401 (registers torch.ops.toka)
from toka.models.encoder_spec import EncoderSpec
from toka.models.linear import Linear
from toka.models.mlp import ACTIVATION_FUNCTIONS
from toka.models.norm import LayerNorm
from toka.placement import PlacementTable, Replicate, Shard
from toka.weights.weight import Weight

_REPLICATED = {"tp": Replicate()}


class LookupTable(nn.Module):
    """A table [N, C] whose rows are read and nothing else: by indexing, so that the compiler, which lays embeddings out as the LM head
    wants them, leaves it as it is."""

    def __init__(self, num_rows: int, hidden_size: int, dtype: torch.dtype):
        super().__init__()
        self.weight = Weight((num_rows, hidden_size), dtype)

    def forward(self, ids_T: Tensor) -> Tensor:
        return self.weight.as_tensor()[ids_T]


class EncoderEmbeddings(nn.Module):
    """Word, position and token type, added and normalised.

    A token of type n has the id `id + n * vocab_size`, so that prompts are plain lists of ids all the way.
    """

    def __init__(self, spec: EncoderSpec, dtype: torch.dtype):
        super().__init__()
        self.word = LookupTable(spec.vocab_size, spec.hidden_size, dtype)
        self.position = LookupTable(spec.num_positions, spec.hidden_size, dtype)
        self.token_type = LookupTable(spec.num_token_types, spec.hidden_size, dtype)
        self.norm = LayerNorm(spec.hidden_size, spec.norm_eps, dtype)
        self._vocab_size, self._first_position = spec.vocab_size, spec.first_position

    def forward(self, token_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        words_TC = self.word(token_ids_T % self._vocab_size)
        types_TC = self.token_type(token_ids_T // self._vocab_size)
        normed_TC: Tensor = self.norm(words_TC + types_TC + self.position(positions_T + self._first_position))
        return normed_TC


class EncoderLayer(nn.Module):
    """A post-norm block: attention, then the MLP, each added to its input and normalised."""

    def __init__(self, spec: EncoderSpec, dtype: torch.dtype):
        super().__init__()
        size = spec.hidden_size
        self.query, self.key, self.value = (Linear(size, size, True, dtype) for _ in range(3))
        self.output = Linear(size, size, True, dtype)
        self.attention_norm = LayerNorm(size, spec.norm_eps, dtype)
        self.up = Linear(size, spec.intermediate_size, True, dtype)
        self.down = Linear(spec.intermediate_size, size, True, dtype)
        self.output_norm = LayerNorm(size, spec.norm_eps, dtype)
        self.activation = ACTIVATION_FUNCTIONS[spec.activation]
        self._head_dim, self._scale = spec.head_dim, spec.head_dim**-0.5

    def forward(self, hidden_TC: Tensor, query_start: Tensor) -> Tensor:
        query_THD, key_THD, value_THD = (
            project(hidden_TC).unflatten(-1, (-1, self._head_dim)) for project in (self.query, self.key, self.value)
        )
        attended_THD = torch.ops.toka.encoder_attention(query_THD, key_THD, value_THD, query_start, self._scale)
        hidden_TC = self.attention_norm(self.output(attended_THD.flatten(1)) + hidden_TC)
        mixed_TC: Tensor = self.down(self.activation(self.up(hidden_TC)))
        normed_TC: Tensor = self.output_norm(mixed_TC + hidden_TC)
        return normed_TC


class ClassificationHead(nn.Module):
    """Two products with a tanh between them, over the first token's hidden state."""

    def __init__(self, spec: EncoderSpec, dtype: torch.dtype):
        super().__init__()
        self.dense = Linear(spec.hidden_size, spec.hidden_size, True, dtype)
        self.out = Linear(spec.hidden_size, spec.num_labels, True, dtype)

    def forward(self, hidden_SC: Tensor) -> Tensor:
        logits_SL: Tensor = self.out(torch.tanh(self.dense(hidden_SC)))
        return logits_SL


class Encoder(nn.Module):
    """Token ids → hidden states of whole prompts, in a flat batch, and a classification head where the spec has labels.

    PLACEMENT: where each weight lives on a mesh.
    """

    PLACEMENT: ClassVar[PlacementTable] = {
        "embeddings.*": _REPLICATED,
        **{f"layers.*.{name}.*": {"tp": Shard(0)} for name in ("query", "key", "value", "up")},
        **{f"layers.*.{name}.weight": {"tp": Shard(1)} for name in ("output", "down")},
        **{f"layers.*.{name}.bias": _REPLICATED for name in ("output", "down")},
        "layers.*_norm.*": _REPLICATED,
        "head.*": _REPLICATED,
    }

    def __init__(self, spec: EncoderSpec, dtype: torch.dtype):
        super().__init__()
        self.spec = spec
        self.embeddings = EncoderEmbeddings(spec, dtype)
        self.layers = nn.ModuleList(EncoderLayer(spec, dtype) for _ in range(spec.num_layers))
        self.head = ClassificationHead(spec, dtype) if spec.num_labels else None
        self._prefix = ""

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, query_start: Tensor) -> Tensor:
        """Hidden states of the last layer, [T, C]; row i of the step owns tokens query_start[i] .. query_start[i + 1] - 1."""
        hidden_TC: Tensor = self.embeddings(token_ids_T, positions_T)
        for layer in self.layers:
            hidden_TC = layer(hidden_TC, query_start)
        return hidden_TC

    # ---------------------------------------------------------------------------------------------- names in checkpoints

    def look_at(self, names: Collection[str]) -> None:
        """Told the names of a checkpoint's tensors: whether they carry the name of the model in a larger one."""
        prefix = "bert." if self.spec.model_type == "bert" else "roberta."
        self._prefix = prefix if any(name.startswith(prefix) for name in names) else ""

    def checkpoint_name(self, weight: str) -> str:
        """Hugging Face's name of one of our weights."""
        module, _, part = weight.rpartition(".")
        if module.startswith("head."):
            return f"{self._head_name(module)}.{part}"
        if module.startswith("layers."):
            _, layer, inner = module.split(".")
            return f"{self._prefix}encoder.layer.{layer}.{_LAYER_NAMES[inner]}.{part}"
        return f"{self._prefix}{_EMBEDDING_NAMES[module]}.{part}"

    def _head_name(self, module: str) -> str:
        if self.spec.model_type == "bert":
            return {"head.dense": f"{self._prefix}pooler.dense", "head.out": "classifier"}[module]
        return {"head.dense": "classifier.dense", "head.out": "classifier.out_proj"}[module]

    def ignores(self, name: str) -> bool:
        """Whether a checkpoint may hold this tensor without our using it: heads for other tasks, and position ids, which are counted."""
        heads = ("pooler.", "cls.", "lm_head.", "classifier.")
        return name.removeprefix(self._prefix).startswith(heads) or name.endswith("embeddings.position_ids")

    def duplicate_of(self, name: str) -> None:
        """No tensor need repeat another."""


_EMBEDDING_NAMES = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
