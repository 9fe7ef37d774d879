"""Which format each weight of a model is stored in: as the checkpoint stores it, in floating point, or quantised at load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from torch import nn

from toka.errors import ConfigError
from toka.weights.gguf_codes import gguf_codes
from toka.weights.gguf_reader import GgufReader
from toka.weights.integer_codes import IntegerCodes
from toka.weights.round_to_nearest import RoundToNearest
from toka.weights.weight import DENSE, Weight, WeightFormat


@dataclass(frozen=True, slots=True)
class QuantizeFlags:
    """What the user wants (see config.Config): quantize "auto", "none" or a format's name; exclude: patterns of names that stay in floating
    point; lm_head: whether embedding and head are quantised too; int8_activations: for formats that leave it open."""

    quantize: str
    exclude: tuple[str, ...]
    lm_head: bool
    int8_activations: bool


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


def plan_formats(checkpoint: Path, flags: QuantizeFlags) -> FormatPlan:
    """Settle the formats of a checkpoint, a GGUF file or a directory. Raises ConfigError if flag and checkpoint don't fit together."""
    if flags.quantize == "auto":
        return _as_stored(checkpoint, flags)
    if flags.quantize == "none":
        return FormatPlan(lambda name: DENSE)
    made = _ROUNDED[flags.quantize](flags.int8_activations)
    return FormatPlan(lambda name: DENSE if _is_excluded(name, flags) else made)


def _as_stored(checkpoint: Path, flags: QuantizeFlags) -> FormatPlan:
    if flags.exclude or flags.lm_head:
        raise ConfigError(
            "quantize_exclude and quantize_lm_head: say what to quantise with quantize=FORMAT too, or leave them out"
        )
    if checkpoint.is_dir():
        return FormatPlan(lambda name: DENSE)
    formats = {
        name: gguf_codes(entry.encoding, flags.int8_activations) or DENSE
        for name, entry in GgufReader(checkpoint).tensors.items()
    }
    return FormatPlan(lambda name: formats.get(name, DENSE))


_EMBEDDINGS = ("*embed_tokens.weight", "lm_head.weight")


def _is_excluded(name: str, flags: QuantizeFlags) -> bool:
    patterns = flags.exclude if flags.lm_head else (*flags.exclude, *_EMBEDDINGS)
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
