"""What a decoder model computes, read from the terms of a Hugging Face config.json. (No torch.)

Every field that changes the mathematics of a supported architecture is either taken over or refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from toka.errors import ConfigError
from toka.models.config_fields import Fields

ARCHITECTURES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Supported model_type → the class name that config.json gives in `architectures`."""

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"]
ROPE_TYPES: tuple[RopeType, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "factors")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding. theta: base of the wavelengths. original_context_tokens: the length trained on, before any scaling.

    dynamic: a token at position p is rotated with the base that transformers uses once p + 1 tokens are there, so that what lies
    in the KV cache depends on the position alone. Up to original_context_tokens that is the default rope. Beyond, it is what
    transformers computes when it is fed token by token; a longer prompt given to transformers at once is rotated as a whole with
    the base of its own length, which no cache that is shared or filled in chunks can follow.
    factors: a divisor for each of the head_dim / 2 frequencies (as GGUF files of Llama 3 have them).
    attention_factor: scales cosines and sines (yarn). beta_fast, beta_slow, truncate: yarn's correction range.
    """

    type: RopeType
    theta: float
    original_context_tokens: int
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder model: pre-norm blocks of attention and a gated MLP.

    max_context_tokens: positions the model is made for, its rope scaling included. sliding_windows: per layer, how many tokens a
    token sees, itself included; 0 = all before it. qkv_bias, output_bias: of the attention's projections. qk_norm: RMSNorm over
    the head dim of queries and keys. tied_head: the LM head is the embedding. checkpoint_dtype: as config.json says, or None.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    activation: str
    norm_eps: float
    rope: RopeSpec
    sliding_windows: tuple[int, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_head: bool
    eos_token_ids: tuple[int, ...]
    checkpoint_dtype: str | None


def read_spec(config: Mapping[str, Any], rope_scaling: Mapping[str, Any] | None = None) -> ModelSpec:
    """The model that a config.json (as `toka.model_source.read_hf_config` gives it) describes.

    rope_scaling: replaces the configuration's rope scaling, with the same keys (its rope_theta stays unless given).
    Raises ConfigError (one line) naming the field that is missing, malformed or not supported.
    """
    fields = Fields(config)
    model_type = _model_type(fields)
    _refuse(fields)
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    num_kv_heads = fields.count("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        fields.fail("num_key_value_heads", f"must divide num_attention_heads={num_heads}")
    head_dim = fields.count("head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads)
    if head_dim % 2:
        fields.fail("head_dim", "must be even")
    num_layers = fields.count("num_hidden_layers")
    rope = _read_rope(fields, rope_scaling, head_dim)
    attention_bias = fields.flag("attention_bias") if model_type in ("llama", "qwen3") else False
    return ModelSpec(
        model_type=model_type,
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.count("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_context_tokens=_max_context_tokens(fields, rope),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        norm_eps=fields.positive("rms_norm_eps", 1e-6),
        rope=rope,
        sliding_windows=_sliding_windows(fields, model_type, num_layers),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=fields.flag("mlp_bias") if model_type == "llama" else False,
        qk_norm=model_type == "qwen3",
        tied_head=fields.flag("tie_word_embeddings"),
        eos_token_ids=_eos_token_ids(fields),
        checkpoint_dtype=fields.checkpoint_dtype(),
    )


def _model_type(fields: Fields) -> str:
    model_type = fields.values.get("model_type")
    if model_type not in ARCHITECTURES:
        fields.fail("model_type", f"is not supported (supported: {', '.join(ARCHITECTURES)})")
    classes = fields.values.get("architectures")
    if classes and ARCHITECTURES[model_type] not in classes:
        fields.fail("architectures", f"must name {ARCHITECTURES[model_type]} for model_type={model_type}")
    return str(model_type)


def _refuse(fields: Fields) -> None:
    """Fields that change the mathematics in ways that toka does not have."""
    if fields.values.get("rope_interleaved"):
        fields.fail("rope_interleaved", "must be false")


def _sliding_windows(fields: Fields, model_type: str, num_layers: int) -> tuple[int, ...]:
    switched_off = "sliding_window" in fields.values and fields.values["sliding_window"] is None
    if switched_off or model_type == "llama" or (model_type != "mistral" and not fields.flag("use_sliding_window")):
        return (0,) * num_layers
    window = fields.count("sliding_window", 4096)  # transformers' default where the field is absent, not null
    if model_type == "mistral":
        return (window,) * num_layers
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first_sliding = fields.values.get("max_window_layers", 28)
        if not isinstance(first_sliding, int):
            fields.fail("max_window_layers", "must be a whole number")
        kinds = ["sliding_attention" if layer >= first_sliding else "full_attention" for layer in range(num_layers)]
    windows = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in windows for kind in kinds):
        fields.fail("layer_types", f"must hold full_attention or sliding_attention for each of {num_layers} layers")
    return tuple(windows[kind] for kind in kinds)


def _read_rope(fields: Fields, override: Mapping[str, Any] | None, head_dim: int) -> RopeSpec:
    """The rope in transformers 5's terms (`rope_parameters`) or the older ones (`rope_scaling` beside `rope_theta`)."""
    stated = fields.values.get("rope_parameters") or {}
    scaling = override or fields.values.get("rope_scaling") or {}
    if not isinstance(stated, Mapping) or not isinstance(scaling, Mapping):
        fields.fail("rope_parameters" if stated else "rope_scaling", "must be an object")
    chosen = {key: value for key, value in (scaling or stated).items() if value is not None}
    if nested := [key for key, value in chosen.items() if isinstance(value, Mapping)]:
        raise ConfigError(
            f"The model's rope parameters differ between layers ({', '.join(nested)}), which is not supported."
        )
    theta = chosen.get("rope_theta", stated.get("rope_theta", fields.values.get("rope_theta")))
    chosen |= {
        "rope_theta": 10_000.0 if theta is None else theta,
        "rope_type": chosen.get("rope_type", chosen.get("type", "default")),
    }
    rope = Fields(chosen, "The model's rope parameters")
    kind = chosen["rope_type"]
    if kind not in ROPE_TYPES:
        rope.fail("rope_type", f"is not supported (supported: {', '.join(ROPE_TYPES)})")
    partial = chosen.get("partial_rotary_factor", fields.values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ConfigError(f"The model's configuration: partial_rotary_factor must be 1, got {str(partial)[:60]!r}.")
    return _rope_of_type(kind, rope, fields, head_dim)


def _rope_of_type(kind: RopeType, rope: Fields, fields: Fields, head_dim: int) -> RopeSpec:
    max_positions = fields.count("max_position_embeddings", 2048)
    outer = (
        fields if fields.values.get("original_max_position_embeddings") is not None else rope
    )  # as transformers has it
    original = outer.count("original_max_position_embeddings", max_positions)
    theta = rope.positive("rope_theta")
    if kind == "default":
        return RopeSpec(type=kind, theta=theta, original_context_tokens=max_positions)
    if kind in ("linear", "dynamic"):
        return RopeSpec(type=kind, theta=theta, original_context_tokens=max_positions, factor=rope.positive("factor"))
    if kind == "factors":
        return RopeSpec(type=kind, theta=theta, original_context_tokens=max_positions, factors=_factors(rope, head_dim))
    if kind == "llama3":
        low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
        if high <= low:
            rope.fail("high_freq_factor", f"must be above low_freq_factor={low}")
        return RopeSpec(
            type=kind,
            theta=theta,
            original_context_tokens=original,
            factor=rope.positive("factor"),
            low_freq_factor=low,
            high_freq_factor=high,
        )
    factor = rope.positive("factor", max_positions / original)
    return RopeSpec(
        type=kind,
        theta=theta,
        original_context_tokens=original,
        factor=factor,
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )


def _factors(rope: Fields, head_dim: int) -> tuple[float, ...]:
    factors = rope.values.get("factors")
    if (
        not isinstance(factors, list)
        or len(factors) != head_dim // 2
        or not all(isinstance(f, float) and f > 0 for f in factors)
    ):
        rope.fail("factors", f"must hold {head_dim // 2} numbers above 0")
    return tuple(factors)


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    if rope.values.get("attention_factor") is not None:
        return rope.positive("attention_factor")

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        return magnitude(rope.positive("mscale")) / magnitude(rope.positive("mscale_all_dim"))
    return magnitude(1.0)


def _max_context_tokens(fields: Fields, rope: RopeSpec) -> int:
    """Configurations differ in whether max_position_embeddings counts the scaling; the larger reading is the limit."""
    max_positions = fields.count("max_position_embeddings", 2048)
    if rope.type in ("linear", "dynamic", "yarn"):
        return max(max_positions, int(rope.original_context_tokens * rope.factor))
    return max_positions


def _eos_token_ids(fields: Fields) -> tuple[int, ...]:
    stated = fields.values.get("eos_token_id")
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        fields.fail("eos_token_id", "must hold token ids")
    return tuple(ids)
