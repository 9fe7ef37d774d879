"""Typed reading of a Hugging Face config.json. (No torch.)"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from toka.errors import ConfigError


class Fields:
    """Typed access to a configuration; a wrong value is a ConfigError that names the field."""

    def __init__(self, values: Mapping[str, Any], where: str = "The model's configuration"):
        self.values, self.where = values, where

    def fail(self, name: str, rule: str) -> NoReturn:
        raise ConfigError(f"{self.where}: {name} {rule}, got {str(self.values.get(name))[:60]!r}.")

    def count(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(name, "must be a whole number above 0")
        return value

    def whole(self, name: str, default: int) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self.fail(name, "must be a whole number, 0 or more")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            self.fail(name, "must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "must be true or false")
        return value

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value = self._get(name, default)
        if value not in choices:
            self.fail(name, f"must be one of {', '.join(choices)}")
        return str(value)

    def checkpoint_dtype(self) -> str | None:
        """The dtype that the checkpoint is stored in, as it says of itself."""
        dtype = self.values.get("dtype") or self.values.get("torch_dtype")
        return str(dtype).removeprefix("torch.") if dtype else None

    def _get(self, name: str, default: Any) -> Any:
        """A field that is null counts as absent, as transformers has it."""
        value = self.values.get(name)
        if value is None and default is None:
            raise ConfigError(f"{self.where} lacks {name}.")
        return default if value is None else value
