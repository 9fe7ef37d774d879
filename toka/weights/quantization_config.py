"""The `quantization_config` of a Hugging Face checkpoint: how its quantised weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from toka.errors import ConfigError
from toka.weights.checkpoint_codes import AwqCodes, CheckpointCodes, CompressedCodes, GptqCodes


def stored_format(config: Mapping[str, Any], int8_activations: bool) -> CheckpointCodes:
    """The format of the checkpoint's quantised weights.

    int8_activations: for formats that leave it open. Raises ConfigError, naming the field, if it is of a kind that is not supported.
    """
    method = str(config.get("quant_method"))
    if method not in _READERS:
        raise ConfigError(
            f"quantization_config: quant_method {method!r} is not supported (supported: {', '.join(_READERS)}; or load a GGUF file, "
            "or an unquantised checkpoint with quantize=FORMAT)"
        )
    return _READERS[method](config, int8_activations)


def _gptq(config: Mapping[str, Any], int8_activations: bool) -> CheckpointCodes:
    bits = _one_of(config, "bits", (2, 3, 4, 8))
    if config.get("dynamic"):
        raise _unsupported("dynamic", "settings that differ from module to module")
    version = config.get("checkpoint_format", "gptq")
    if version not in ("gptq", "gptq_v2"):
        raise _unsupported("checkpoint_format", str(version))
    return GptqCodes(
        f"gptq_int{bits}",
        bits=8 if bits == 8 else 4,
        group_size=_group_size(config),
        has_minimums=not config.get("sym", True),
        int8_activations=int8_activations,
        stored_bits=bits,
        is_ordered=bool(config.get("desc_act", False)),
        zero_offset=1 if version == "gptq" else 0,
    )


def _awq(config: Mapping[str, Any], int8_activations: bool) -> CheckpointCodes:
    _one_of(config, "bits", (4,))
    if config.get("version", "gemm") != "gemm":
        raise _unsupported("version", f"{config['version']} (gemm is supported)")
    return AwqCodes("awq_int4", 4, _group_size(config), True, int8_activations, stored_bits=4, is_ordered=False)


def _compressed(config: Mapping[str, Any], int8_activations: bool) -> CheckpointCodes:
    kind, groups = config.get("format"), config.get("config_groups") or {}
    if kind not in ("pack-quantized", "int-quantized"):
        raise _unsupported("format", f"{kind} (pack-quantized and int-quantized are supported)")
    if len(groups) != 1:
        raise _unsupported("config_groups", f"{len(groups)} groups of settings (one is supported)")
    [group] = groups.values()
    weights, activations = group.get("weights") or {}, group.get("input_activations")
    bits = _one_of(weights, "num_bits", (4, 8) if kind == "pack-quantized" else (8,))
    strategy = weights.get("strategy")
    if weights.get("type", "int") != "int" or strategy not in ("group", "channel", "tensor"):
        raise _unsupported("weights", f"type {weights.get('type')} by {strategy}")
    if activations is not None and (activations.get("num_bits"), activations.get("type", "int")) != (8, "int"):
        raise _unsupported(
            "input_activations",
            f"{activations.get('num_bits')} bits of {activations.get('type')} (8 bits of int are supported)",
        )
    return CompressedCodes(
        f"compressed_int{bits}",
        bits=bits,
        group_size=_group_size(weights) if strategy == "group" else 0,
        has_minimums=not weights.get("symmetric", True),
        int8_activations=True if activations is not None else int8_activations,
        stored_bits=bits,
        is_ordered=weights.get("actorder") in ("group", "dynamic"),
        is_packed=kind == "pack-quantized",
    )


_READERS: Mapping[str, Callable[[Mapping[str, Any], bool], CheckpointCodes]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}


def _group_size(config: Mapping[str, Any]) -> int:
    """0 = the whole row, which checkpoints call -1."""
    size = config.get("group_size")
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and (size < 8 or size % 8)):
        raise ConfigError(f"quantization_config: group_size must be -1 or a multiple of 8, got {size!r}")
    return max(size, 0)


def _one_of(config: Mapping[str, Any], field: str, allowed: tuple[int, ...]) -> int:
    value = config.get(field)
    if value not in allowed:
        raise ConfigError(f"quantization_config: {field} must be one of {', '.join(map(str, allowed))}, got {value!r}")
    return int(value)


def _unsupported(field: str, what: str) -> ConfigError:
    return ConfigError(f"quantization_config: {field}: {what} is not supported")
