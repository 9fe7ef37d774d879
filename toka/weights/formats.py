"""Which format each weight of a model is stored in: as the checkpoint stores it, in floating point, or quantised at load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from torch import nn

from toka.errors import ConfigError
from toka.weights.gguf_codes import gguf_codes
from toka.weights.gguf_reader import GgufReader
from toka.weights.inflated import Inflated
from toka.weights.integer_codes import IntegerCodes
from toka.weights.quantization_config import stored_format
from toka.weights.round_to_nearest import RoundToNearest
from toka.weights.safetensors_reader import SafetensorsReader
from toka.weights.weight import DENSE, Weight, WeightFormat


@dataclass(frozen=True, slots=True)
class QuantizeFlags:
    """What the user wants (see config.Config): quantize "auto", "none" or a format's name; exclude: patterns of names that stay in floating
    point; lm_head: whether embedding and head are quantised too; int8_activations: for formats that leave it open; has_kernels: whether
    the device multiplies with codes; if not, those of a checkpoint are inflated."""

    quantize: str
    exclude: tuple[str, ...]
    lm_head: bool
    int8_activations: bool
    has_kernels: bool = True


class NamedWeights(Protocol):
    """What is asked of a model here."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def checkpoint_name(self, weight: str) -> str: ...


@dataclass(frozen=True, slots=True)
class FormatPlan:
    """format_of: the format of the matrix that the checkpoint calls by this name."""

    format_of: Callable[[str], WeightFormat]

    def apply(self, model: NamedWeights) -> None:
        """Give every matrix of the model its format; to be called before anything is loaded or traced."""
        for name, module in list(model.named_modules()):
            if isinstance(module, Weight) and len(module.shape) == 2:
                module.use_format(self.format_of(model.checkpoint_name(name)))


def plan_formats(checkpoint: Path, hf_config: Mapping[str, Any], flags: QuantizeFlags) -> FormatPlan:
    """Settle the formats of a checkpoint, a GGUF file or a directory.

    hf_config: what its config.json says. Raises ConfigError if flags and checkpoint don't fit together.
    """
    stored = hf_config.get("quantization_config")
    if flags.quantize in ("auto", "none"):
        return _as_stored(checkpoint, stored, flags)
    if stored is not None:
        raise ConfigError(
            f"quantize={flags.quantize}: the checkpoint is quantised already ({stored.get('quant_method')}); leave the flag out"
        )
    if not flags.has_kernels:
        raise ConfigError(
            f"quantize={flags.quantize}: this version multiplies with integer codes on the CPU only; leave the flag out"
        )
    made = _ROUNDED[flags.quantize](flags.int8_activations)
    return FormatPlan(lambda name: DENSE if _is_excluded(name, flags) else made)


def _as_stored(checkpoint: Path, stored: Mapping[str, Any] | None, flags: QuantizeFlags) -> FormatPlan:
    if flags.exclude or flags.lm_head:
        raise ConfigError(
            "quantize_exclude and quantize_lm_head: say what to quantise with quantize=FORMAT too, or leave them out"
        )
    keeps_codes = flags.quantize == "auto" and flags.has_kernels
    if stored is not None:
        quantised, has_codes = stored_format(stored, flags.int8_activations), _weights_with_codes(checkpoint)
        kept = quantised if keeps_codes else Inflated(quantised)
        return FormatPlan(lambda name: kept if has_codes(name, quantised.checkpoint_names(name)[0]) else DENSE)
    if checkpoint.is_dir() or not keeps_codes:
        return FormatPlan(lambda name: DENSE)
    formats = {
        name: gguf_codes(entry.encoding, flags.int8_activations) or DENSE
        for name, entry in GgufReader(checkpoint).tensors.items()
    }
    return FormatPlan(lambda name: formats.get(name, DENSE))


def _weights_with_codes(directory: Path) -> Callable[[str, str], bool]:
    """Tells from a weight's name, and that of the tensor its codes would be in, whether it is quantised.

    The tensors that there are tell it; without any (a configuration alone) all are but embedding and head.
    """
    if not any(directory.glob("*.safetensors*")):
        return lambda name, codes: not _matches(name, _EMBEDDINGS)
    tensors = SafetensorsReader(directory).tensors
    return lambda name, codes: codes in tensors and not tensors[codes].dtype.is_floating_point


_EMBEDDINGS = ("*embed_tokens.weight", "lm_head.weight")


def _is_excluded(name: str, flags: QuantizeFlags) -> bool:
    patterns = flags.exclude if flags.lm_head else (*flags.exclude, *_EMBEDDINGS)
    return _matches(name, patterns)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _rounded(
    name: str, bits: int, group_size: int, has_minimums: bool, int8_activations: bool | None = None
) -> Callable[[bool], IntegerCodes]:
    """int8_activations: None = as the user says."""
    return lambda asked: RoundToNearest(
        name, bits, group_size, has_minimums, asked if int8_activations is None else int8_activations
    )


# The names of config.QUANTIZE_FORMATS.
_ROUNDED: Mapping[str, Callable[[bool], IntegerCodes]] = MappingProxyType(
    {
        "int8_channel": _rounded("int8_channel", 8, 0, has_minimums=False, int8_activations=False),
        "int8_channel_dynamic": _rounded("int8_channel_dynamic", 8, 0, has_minimums=False, int8_activations=True),
        "int4_group32": _rounded("int4_group32", 4, 32, has_minimums=True),
        "int4_group128": _rounded("int4_group128", 4, 128, has_minimums=True),
        "gguf_q4_0": _rounded("gguf_q4_0", 4, 32, has_minimums=False),
        "gguf_q4_1": _rounded("gguf_q4_1", 4, 32, has_minimums=True),
        "gguf_q8_0": _rounded("gguf_q8_0", 8, 32, has_minimums=False),
    }
)
