"""Reads the safetensors files of a Hugging Face directory: one file, or several with an index. Never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from toka.errors import ConfigError
from toka.weights.weight import TensorEntry

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsReader:
    """The tensors of all safetensors files that make up the checkpoint in a directory."""

    def __init__(self, directory: Path):
        """Read the heads of the files. Raises ConfigError (one line) if one is missing, truncated, corrupt, or not in the index."""
        self._tensors: dict[str, TensorEntry] = {}
        self._open_path: Path | None = None
        self._open_file: Any = None
        files, promised = _files_of(directory)
        for file in files:
            self._add(file)
        for name, file_name in promised.items():
            entry = self._tensors.get(name)
            if entry is None or entry.file.name != file_name:
                raise ConfigError(f"{directory / _INDEX} says that tensor {name!r} is in {file_name}, but it is not.")

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return self._tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        entry = self._tensors[name]
        try:
            rows: Tensor = self._opened(entry.file).get_slice(name)[start:stop]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"Tensor {name!r} cannot be read from {entry.file}: {error}.") from None
        return rows

    def _opened(self, path: Path) -> Any:
        """The open file; one at a time, so that no more than one file is mapped into memory."""
        if self._open_path != path:
            self._open_path, self._open_file = path, _open(path)
        return self._open_file

    def _add(self, path: Path) -> None:
        file = self._opened(path)
        for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            if name in self._tensors:
                raise ConfigError(f"Tensor {name!r} is in both {self._tensors[name].file} and {path}.")
            piece = file.get_slice(name)
            encoding = piece.get_dtype()
            if encoding not in _DTYPES:
                raise ConfigError(f"Tensor {name!r} in {path} is of type {encoding}, which is not supported.")
            self._tensors[name] = TensorEntry(tuple(piece.get_shape()), encoding, _DTYPES[encoding], path)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing.") from None
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror or error}.") from None
    except SafetensorError as error:
        raise ConfigError(f"{path} is truncated, corrupt or no safetensors file ({error}).") from None


def _files_of(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The checkpoint's files, and what its index (if it has one) says to be in which."""
    if (directory / _INDEX).is_file():
        promised = _read_index(directory / _INDEX)
        files = [directory / name for name in dict.fromkeys(promised.values())]
        for file in files:
            if not file.is_file():
                raise ConfigError(f"{file} is missing, though {_INDEX} names it.")
        return files, promised
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE], {}
    found = sorted(directory.glob("*.safetensors"))
    if len(found) != 1:
        raise ConfigError(f"{directory} holds {len(found)} *.safetensors files but neither {_SINGLE} nor {_INDEX}.")
    return found, {}


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        promised = {str(name): str(file) for name, file in weight_map.items()}
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}.") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ConfigError(
            f"{path} is malformed: it must be a JSON object whose weight_map says which file holds which tensor."
        ) from None
    for file in promised.values():
        if Path(file).name != file:
            raise ConfigError(f"{path} is malformed: {file[:80]!r} is not a plain file name.")
    return promised
