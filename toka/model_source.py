"""Finds the model that `model=` names and reads its configuration (floor 1, no torch).

A model is a Hugging Face directory, a GGUF file, a hub id, or `default`: the pinned SmolLM2 that toka fetches by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from toka import embedded_model
from toka.embedded_model import ANOTHER_MODEL, Progress
from toka.errors import ConfigError
from toka.gguf_config import to_hf_config
from toka.gguf_file import GgufFile

_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]  # no pickle is ever fetched
_DUPLICATES = ["consolidated*.safetensors"]  # Mistral's repositories hold the weights a second time under its own names
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model lies.

    path: a directory with config.json and safetensors files ("hf_dir") or one file ("gguf"). tokenizer_path: a directory, a
    tokenizer.json or a GGUF file. name: the model's own id: its hub id, else the stem of its directory or file.
    """

    kind: Literal["hf_dir", "gguf"]
    path: Path
    tokenizer_path: Path
    name: str


def locate(
    model: str,
    tokenizer: str | None,
    cache_dir: Path,
    *,
    offline: bool = False,
    on_progress: Progress | None = None,
) -> ModelSource:
    """Find the model, fetching it if it has to be.

    model: "default", a path, or a hub id. tokenizer: likewise, or None for the model's own. cache_dir: where the default model
    is kept. offline: never use the network. on_progress: told of the default model's download; None shows a bar on stderr.
    Raises ConfigError in one line that says what was looked for and what to do.
    """
    kind, path, name = _locate_model(model, cache_dir, offline, on_progress)
    tokenizer_path = path if tokenizer is None else _locate_tokenizer(tokenizer, cache_dir, offline, on_progress)
    return ModelSource(kind, path, tokenizer_path, name)


def locate_configuration(model: str, cache_dir: Path, *, offline: bool = False) -> ModelSource:
    """As `locate`, but of a directory or a hub id nothing is needed or fetched beyond its configuration: no weights."""
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelSource("hf_dir", path, path, path.resolve().name)
    if model == "default" or path.exists() or not _is_hub_id(model):
        return locate(model, None, cache_dir, offline=offline)
    directory = _fetch_from_hub(model, offline, ["*.json"])
    return ModelSource("hf_dir", directory, directory, model)


def read_hf_config(source: ModelSource) -> dict[str, Any]:
    """The model's configuration in the terms of config.json; of a GGUF file it is translated from the metadata.

    `eos_token_id` is a list of all ids that end a text: those of generation_config.json and those of config.json.
    Raises ConfigError if a file is missing or malformed.
    """
    if source.kind == "gguf":
        return to_hf_config(GgufFile.open(source.path))
    config = _read_json_object(source.path / "config.json")
    generation = source.path / "generation_config.json"
    stated = [_read_json_object(generation).get("eos_token_id")] if generation.is_file() else []
    config["eos_token_id"] = _merged_ids([*stated, config.get("eos_token_id")], source.path)
    return config


def _locate_model(
    model: str, cache_dir: Path, offline: bool, on_progress: Progress | None
) -> tuple[Literal["hf_dir", "gguf"], Path, str]:
    if model == "default":
        return "gguf", embedded_model.path(cache_dir, offline=offline, on_progress=on_progress), embedded_model.NAME
    path = Path(model).expanduser()
    if path.is_dir():
        _check_hf_directory(path)
        return "hf_dir", path, path.resolve().name
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"model={model} is a file but no .gguf; {ANOTHER_MODEL}.")
        return "gguf", path, path.stem
    if not _is_hub_id(model):
        raise ConfigError(f"model={model}: there is no such file or directory; {ANOTHER_MODEL}.")
    directory = _fetch_from_hub(model, offline)
    _check_hf_directory(directory)
    return "hf_dir", directory, model


def _locate_tokenizer(tokenizer: str, cache_dir: Path, offline: bool, on_progress: Progress | None) -> Path:
    if tokenizer == "default":
        return embedded_model.path(cache_dir, offline=offline, on_progress=on_progress)
    path = Path(tokenizer).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix.lower() in (".json", ".gguf")):
        return path
    if path.is_file() or not _is_hub_id(tokenizer):
        raise ConfigError(
            f"tokenizer={tokenizer}: no directory, tokenizer.json or .gguf file is there; "
            "pass tokenizer=PATH with one of these."
        )
    return _fetch_from_hub(tokenizer, offline, [f for f in _HUB_FILES if f != "*.safetensors"], flag="tokenizer")


def _is_hub_id(name: str) -> bool:
    owner, slash, repository = name.partition("/")
    return bool(owner and slash and repository) and "/" not in repository and name[0] not in "./~" and "\\" not in name


def _check_hf_directory(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ConfigError(f"{path} has no config.json, so it is no Hugging Face model directory; {ANOTHER_MODEL}.")
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").is_file():
        return
    if any(any(path.glob(pattern)) for pattern in _PICKLES):
        raise ConfigError(f"{path} holds pickled weights only, which toka never loads; convert them to safetensors.")
    raise ConfigError(f"{path} holds no *.safetensors file; {ANOTHER_MODEL}.")


def _fetch_from_hub(repository: str, offline: bool, files: list[str] | None = None, flag: str = "model") -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    where = f"{flag}={repository}: no such path here, and the hub"
    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=files or _HUB_FILES, ignore_patterns=_DUPLICATES, local_files_only=offline
            )
        )
    except RepositoryNotFoundError:
        why = f"{where} has no repository of that name (or it is private; log in with `hf auth login`)"
    except LocalEntryNotFoundError:
        why = f"{where} is {'switched off (HF_HUB_OFFLINE)' if offline else 'out of reach'} with no copy in its cache"
    except HfHubHTTPError as error:
        why = f"{where} answered with status {getattr(error.response, 'status_code', 'unknown')}"
    except Exception as error:  # the hub's client lets errors of whatever HTTP library it uses through
        why = f"{where} could not be read ({_first_line(error)})"
    raise ConfigError(f"{why}; {ANOTHER_MODEL}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    except ValueError as error:  # bad JSON, or bytes that are no UTF-8
        raise ConfigError(f"{path} is not valid JSON: {_first_line(error)}.") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _merged_ids(stated: list[Any], path: Path) -> list[int]:
    """Flatten ids given as None, an int or a list of ints; the first mention decides the order."""
    merged: dict[int, None] = {}
    for value in stated:
        for token_id in value if isinstance(value, list) else [value]:
            if isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0:
                merged[token_id] = None
            elif token_id is not None:
                raise ConfigError(f"{path}: eos_token_id must hold token ids, got {str(token_id)[:40]!r}.")
    return list(merged)
