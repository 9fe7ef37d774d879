"""What an engine that generates nothing does with a prompt: its task, how hidden states become one vector, what is done to that
(floor 1, no torch). Settled from the flags, the checkpoint's configuration and the files that sentence-transformers puts beside it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from toka.config import Config
from toka.errors import ConfigError, RequestError

F32 = npt.NDArray[np.float32]

ENCODERS: dict[str, str] = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
"""model_type of encoders → what the names of their classes begin with."""

Mode = Literal["last", "mean", "cls"]

_POOLING_KEYS: dict[str, Mode] = {
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
}
_POOLING_NAMES: dict[str, Mode] = {"lasttoken": "last", "mean": "mean", "cls": "cls"}
_NO_VECTOR = np.float32(1e-12)  # a shorter one has no direction: sentence-transformers' Normalize divides by no less


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """How a prompt becomes a vector.

    task: "embed" = the vector is the result; "score" = a classification head makes one number of it, how well a pair of texts fits.
    mode: of which hidden states the vector is made: the last token's, the mean of all, or the first token's (cls).
    normalize: whether vectors have length 1 unless a request asks otherwise. applies_sigmoid: to the head's number.
    is_encoder: whether tokens see those behind them, so that a prompt is computed whole. max_prompt_tokens: as the checkpoint's
    files limit it; None = they don't. width: numbers in a vector (0 until the model is known).
    num_token_types, vocab_size: a token of a pair's second text is written as its id plus vocab_size where there are two types.
    """

    task: Literal["embed", "score"]
    mode: Mode
    normalize: bool
    is_encoder: bool
    applies_sigmoid: bool = False
    max_prompt_tokens: int | None = None
    width: int = 0
    num_token_types: int = 1
    vocab_size: int = 0

    def finish(self, vector: F32, dimensions: int | None = None, normalize: bool | None = None) -> F32:
        """The embedding of a pooled vector: its first `dimensions` numbers (Kusupati et al. 2022, Matryoshka), brought to length 1 if
        `normalize`, by default what the model was made for.
        """
        kept = vector if dimensions is None else vector[:dimensions]
        if not (self.normalize if normalize is None else normalize):
            return kept
        normalized: F32 = kept / max(np.float32(np.linalg.norm(kept)), _NO_VECTOR)
        return normalized

    def score(self, vector: F32) -> float:
        """What the head says of a pair."""
        value = float(vector[0])
        if not self.applies_sigmoid:
            return value
        shrunk = math.exp(-abs(value))  # which cannot overflow
        return (1.0 if value >= 0 else shrunk) / (1.0 + shrunk)

    def check_dimensions(self, dimensions: int) -> None:
        """Raise RequestError unless a vector can be cut to so many numbers."""
        if not 1 <= dimensions <= self.width:
            raise RequestError(f"dimensions must be between 1 and {self.width}, got {dimensions}.", "dimensions")

    def pair_ids(self, token_ids: Sequence[int], token_types: Sequence[int]) -> list[int]:
        """A pair's token ids as prompts carry them; token_types: 1 for tokens of the second text."""
        offset = self.vocab_size if self.num_token_types > 1 else 0
        return [token_id + offset * kind for token_id, kind in zip(token_ids, token_types, strict=True)]


def tokens_kept(truncate_prompt_tokens: int | None, most: int) -> int | None:
    """What prompts are cut to; None = they are not. most: tokens that the model holds, which -1 stands for.

    Raises RequestError if a request asks for another number.
    """
    if truncate_prompt_tokens is None or 1 <= truncate_prompt_tokens <= most:
        return truncate_prompt_tokens
    if truncate_prompt_tokens == -1:
        return most
    raise RequestError(
        f"truncate_prompt_tokens must be -1 or between 1 and {most}, got {truncate_prompt_tokens}.",
        "truncate_prompt_tokens",
    )


def cosine(one: F32, other: F32) -> float:
    """Cosine of the angle between two vectors; 0 if one of them is 0."""
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 0.0


def read_pooling(config: Config, hf_config: Mapping[str, Any], directory: Path | None) -> Pooling | None:
    """What the engine is to do beside generating; None: it generates. directory: the checkpoint's, None if it is one file.

    Raises ConfigError, naming flag or file, if flags and checkpoint do not fit together.
    """
    is_encoder = hf_config.get("model_type") in ENCODERS
    classes = hf_config.get("architectures") or []
    classifies = is_encoder and any(str(name).endswith("ForSequenceClassification") for name in classes)
    task = config.task
    modules = _read_modules(directory) if task in ("auto", "embed") and not classifies else None
    if task == "auto":
        task = "score" if classifies else "embed" if is_encoder or modules is not None else "generate"
    if task == "generate":
        if is_encoder:
            raise ConfigError(f"task=generate: an encoder ({hf_config['model_type']}) generates no text; leave it out")
        if config.pooling != "auto":
            raise ConfigError(f"pooling={config.pooling}: needs task=embed")
        return None
    if task == "score":
        return _of_cross_encoder(config, hf_config, classifies)
    mode, normalize, max_tokens = modules or ("mean" if is_encoder else "last", True, None)
    mode = mode if config.pooling == "auto" else config.pooling  # type: ignore[assignment]
    if mode == "cls" and not is_encoder:
        raise ConfigError("pooling=cls: a decoder's first token sees nothing but itself; choose last or mean")
    return Pooling(task="embed", mode=mode, normalize=normalize, is_encoder=is_encoder, max_prompt_tokens=max_tokens)


def _of_cross_encoder(config: Config, hf_config: Mapping[str, Any], classifies: bool) -> Pooling:
    if not classifies:
        raise ConfigError(
            "task=score: the checkpoint has no classification head; under task=embed /v1/score compares embeddings"
        )
    if config.pooling not in ("auto", "cls"):
        raise ConfigError(f"pooling={config.pooling}: a classification head reads the first token (cls)")
    return Pooling(
        task="score", mode="cls", normalize=False, is_encoder=True, applies_sigmoid=_applies_sigmoid(hf_config)
    )


def _applies_sigmoid(hf_config: Mapping[str, Any]) -> bool:
    """As sentence-transformers decides it for one label: the sigmoid, unless the configuration names another function."""
    own = hf_config.get("sentence_transformers")
    named = own.get("activation_fn") if isinstance(own, Mapping) else None
    named = named or hf_config.get("sbert_ce_default_activation_function") or "Sigmoid"
    function = str(named).rpartition(".")[2]
    if function not in ("Sigmoid", "Identity"):
        raise ConfigError(f"The model's configuration: the score's activation {str(named)[:60]!r} is not supported.")
    return function == "Sigmoid"


def _read_modules(directory: Path | None) -> tuple[Mode, bool, int | None] | None:
    """(mode, normalize, most tokens of a prompt) as modules.json and the folders beside it say; None if there is none."""
    if directory is None or not (directory / "modules.json").is_file():
        return None
    path = directory / "modules.json"
    kinds = {}
    for module in _read_json(path, list):
        if not isinstance(module, dict):
            raise ConfigError(f"{path} must hold a list of objects")
        kinds[str(module.get("type")).rpartition(".")[2]] = str(module.get("path") or "")
    if unknown := sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}):
        raise ConfigError(
            f"{path}: the module {unknown[0]} is not supported (supported: Transformer, Pooling, Normalize)"
        )
    if "Pooling" not in kinds or kinds.get("Transformer"):
        raise ConfigError(f"{path}: must name a Pooling module, and a Transformer whose files are in {directory}")
    settings_path = directory / "sentence_bert_config.json"
    settings = _read_json(settings_path, dict) if settings_path.is_file() else {}
    max_tokens = settings.get("max_seq_length")
    if max_tokens is not None and (not isinstance(max_tokens, int) or max_tokens < 1):
        raise ConfigError(f"{settings_path}: max_seq_length must be a whole number above 0")
    return _read_mode(directory / kinds["Pooling"] / "config.json"), "Normalize" in kinds, max_tokens


def _read_mode(path: Path) -> Mode:
    """The one mode that a Pooling module's configuration switches on."""
    settings = _read_json(path, dict)
    on = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    named = settings.get("pooling_mode")
    if named in _POOLING_NAMES and not on:
        return _POOLING_NAMES[named]
    if len(on) != 1 or on[0] not in _POOLING_KEYS or named is not None:
        found = named or " and ".join(on) or "none"
        raise ConfigError(
            f"{path}: pooling mode {found} is not supported (supported: one of {', '.join(_POOLING_NAMES)})"
        )
    return _POOLING_KEYS[on[0]]


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON ({error})") from None
    if not isinstance(value, kind):
        raise ConfigError(f"{path} must hold a JSON {'object' if kind is dict else 'array'}")
    return value
