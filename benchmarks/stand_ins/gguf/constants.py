"""Names of GGUF's types without their meaning."""

from __future__ import annotations

from typing import NoReturn


class _Names(type):
    """A class of which every attribute is there: a value that equals nothing but itself."""

    def __getattr__(cls, name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        value = object()
        setattr(cls, name, value)
        return value

    def __call__(cls, *arguments: object) -> NoReturn:
        raise ImportError("gguf is missing: GGUF files can't be read here; pip install gguf")


class GGMLQuantizationType(metaclass=_Names):
    """How a tensor is stored."""


class GGUFValueType(metaclass=_Names):
    """How a value of the metadata is stored."""


GGML_QUANT_SIZES: dict[object, tuple[int, int]] = {}
