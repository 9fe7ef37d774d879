"""What an encoder (BERT and its kin) computes, read from the terms of a Hugging Face config.json. (No torch.)

Every field that changes the mathematics of a supported architecture is either taken over or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toka.models.config_fields import Fields
from toka.pooling import ENCODERS

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """One encoder: embeddings, then post-norm blocks of bidirectional attention and an MLP.

    model_type: the family, a key of ENCODERS. max_context_tokens: tokens of a prompt, special ones included. first_position: the row of the
    position table that a prompt's first token reads. num_token_types: kinds of segments (a pair's texts are of different kinds).
    num_labels: outputs of the classification head, 0 = there is none or it is not wanted.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_context_tokens: int
    first_position: int
    num_token_types: int
    activation: str
    norm_eps: float
    num_labels: int
    checkpoint_dtype: str | None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_positions(self) -> int:
        """Rows of the position table."""
        return self.first_position + self.max_context_tokens


def read_encoder_spec(config: Mapping[str, Any], *, with_classifier: bool) -> EncoderSpec:
    """The encoder that a config.json describes. with_classifier: whether its classification head is wanted.

    Raises ConfigError (one line) naming the field that is missing, malformed or not supported.
    """
    fields = Fields(config)
    model_type = fields.values.get("model_type")
    if model_type not in ENCODERS:
        fields.fail("model_type", f"is no supported encoder (supported: {', '.join(ENCODERS)})")
    _refuse(fields)
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if hidden_size % num_heads:
        fields.fail("num_attention_heads", f"must divide hidden_size={hidden_size}")
    num_positions = fields.count("max_position_embeddings", 512)
    # RoBERTa counts positions from behind the padding token's id.
    first_position = 0 if model_type == "bert" else fields.whole("pad_token_id", 1) + 1
    if num_positions <= first_position:
        fields.fail("max_position_embeddings", f"must be above {first_position}")
    return EncoderSpec(
        model_type=str(model_type),
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=fields.count("num_hidden_layers"),
        num_heads=num_heads,
        max_context_tokens=num_positions - first_position,
        first_position=first_position,
        num_token_types=fields.count("type_vocab_size", 2),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        norm_eps=fields.positive("layer_norm_eps", 1e-12),
        num_labels=_num_labels(fields) if with_classifier else 0,
        checkpoint_dtype=fields.checkpoint_dtype(),
    )


def _refuse(fields: Fields) -> None:
    """Fields that change the mathematics in ways that toka does not have."""
    fields.choice("position_embedding_type", ("absolute",), "absolute")
    for name in ("is_decoder", "add_cross_attention"):
        if fields.flag(name):
            fields.fail(name, "must be false")
    if fields.values.get("quantization_config") is not None:
        fields.fail("quantization_config", "is not supported (load an unquantised checkpoint)")


def _num_labels(fields: Fields) -> int:
    labels = fields.values.get("id2label")
    return len(labels) if isinstance(labels, Mapping) else fields.count("num_labels", 2)
