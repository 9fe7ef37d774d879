"""Says the metadata of a GGUF file in the terms of a Hugging Face config.json (floor 1, no torch).

Every key below the architecture's name is translated, known to leave the mathematics alone, or refused by name: llama.cpp keeps
scales and variants there, and a model that ran without one of them would only talk nonsense.
"""

from __future__ import annotations

import math
from typing import Any, NoReturn

import numpy as np
from gguf.constants import GGMLQuantizationType

from toka.errors import ConfigError
from toka.gguf_file import GgufFile

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # llama.cpp files Mistral and SmolLM under llama
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor in which llama.cpp's converter stores Llama 3's rope scaling: one divisor for each frequency."""

_TRANSLATED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_HANDLED = {
    "vocab_size",
    "attention.key_length",
    "attention.value_length",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.scale": 0.0,
    "embedding_scale": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "tensor_data_layout": "Meta AI original pth",
    "use_parallel_residual": False,
}
"""Keys that change the mathematics in a way toka does not have, with the one value that means: not used."""


def to_hf_config(gguf: GgufFile) -> dict[str, Any]:
    """The config.json that would describe the same model; `rope_type` "factors" carries the divisors of `ROPE_FACTORS`.

    Raises ConfigError (one line) for an architecture or a metadata key that is not supported, or one that is missing.
    """
    arch = str(gguf.metadata.get("general.architecture"))
    if arch not in SUPPORTED_ARCHITECTURES:
        _fail(gguf, f"architecture {arch!r} is not supported (supported: {', '.join(SUPPORTED_ARCHITECTURES)})")
    values = {key[len(arch) + 1 :]: value for key, value in gguf.metadata.items() if key.startswith(f"{arch}.")}
    _refuse_unknown(gguf, arch, values)
    config: dict[str, Any] = {theirs: _required(gguf, arch, values, ours) for ours, theirs in _TRANSLATED.items()}
    window = values.get("attention.sliding_window") or None
    config |= {
        "model_type": "mistral" if arch == "llama" and window else arch,
        "head_dim": _head_dim(gguf, arch, values, config),
        "vocab_size": _vocab_size(gguf),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
        "sliding_window": window,
        "use_sliding_window": bool(window),
        "max_window_layers": 0,
        "rope_parameters": _rope_parameters(gguf, arch, values),
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _eos_token_ids(gguf),
    }
    if dtype := _stored_dtype(gguf):
        config["dtype"] = dtype
    return config


def _fail(gguf: GgufFile, why: str) -> NoReturn:
    raise ConfigError(f"{gguf.path} cannot be used: {why}.")


def _required(gguf: GgufFile, arch: str, values: dict[str, Any], key: str) -> Any:
    if key == "attention.head_count_kv" and key not in values:
        key = "attention.head_count"  # no grouped-query attention
    if key not in values:
        _fail(gguf, f"its metadata lacks {arch}.{key}")
    if isinstance(values[key], np.ndarray):
        _fail(gguf, f"{arch}.{key} differs from layer to layer, which is not supported")
    return values[key]


def _refuse_unknown(gguf: GgufFile, arch: str, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if key in _TRANSLATED or key in _HANDLED or (key in _NEUTRAL and value == _NEUTRAL[key]):
            continue
        _fail(gguf, f"metadata {arch}.{key}={str(value)[:40]} is not supported")


def _head_dim(gguf: GgufFile, arch: str, values: dict[str, Any], config: dict[str, Any]) -> int:
    head_dim = values.get("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.get(key, head_dim) != head_dim:
            _fail(gguf, f"{arch}.{key}={values[key]} differs from the head dim {head_dim}, which is not supported")
    return int(head_dim)


def _vocab_size(gguf: GgufFile) -> int:
    if "token_embd.weight" not in gguf.tensors:
        _fail(gguf, "it lacks the tensor 'token_embd.weight'")
    return gguf.tensors["token_embd.weight"].shape[0]


def _rope_parameters(gguf: GgufFile, arch: str, values: dict[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": values.get("rope.freq_base", 10_000.0)}
    kind, factor = values.get("rope.scaling.type", "none"), values.get("rope.scaling.factor", 0.0)
    if "rope.scaling.type" not in values and values.get("rope.scale_linear", 1.0) != 1.0:  # before scaling had types
        kind, factor = "linear", values["rope.scale_linear"]
    if ROPE_FACTORS in gguf.tensors:
        if kind != "none":
            _fail(gguf, f"it has both {ROPE_FACTORS} and rope scaling of type {kind!r}")
        return rope | {"rope_type": "factors", "factors": _rope_factors(gguf)}
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        _fail(gguf, f"{arch}.rope.scaling.type={kind!r} is not supported (supported: none, linear, yarn)")
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = values.get(
            "rope.scaling.original_context_length", values["context_length"]
        )
        rope["beta_fast"] = values.get("rope.scaling.yarn_beta_fast")
        rope["beta_slow"] = values.get("rope.scaling.yarn_beta_slow")
        if (
            scale := values.get("rope.scaling.attn_factor", 1.0)
        ) != 1.0:  # llama.cpp multiplies yarn's own factor by it
            rope["attention_factor"] = scale * (1.0 + 0.1 * math.log(factor))
    return rope


def _rope_factors(gguf: GgufFile) -> list[float]:
    tensor = gguf.tensors[ROPE_FACTORS]
    if tensor.type is not GGMLQuantizationType.F32:
        _fail(gguf, f"{ROPE_FACTORS} must be F32, it is {tensor.type.name}")
    factors = np.fromfile(gguf.path, "<f4", count=math.prod(tensor.shape), offset=tensor.offset)
    return [float(factor) for factor in factors]


def _eos_token_ids(gguf: GgufFile) -> list[int]:
    """Ids that end a text: end of sequence, end of turn and end of message, as far as the file names them."""
    keys = ("eos", "eot", "eom")
    ids = [gguf.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys]
    return list(dict.fromkeys(int(i) for i in ids if i is not None))


def _stored_dtype(gguf: GgufFile) -> str | None:
    """The dtype of the matrices if all have the same unquantised one."""
    types = {tensor.type.name for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names.get(types.pop()) if len(types) == 1 else None
