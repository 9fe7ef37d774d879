"""Stands in for msgspec where that is missing: structs are dataclasses, and nothing can be encoded.

Within one process the engine uses msgspec for values only; messages are encoded by the server, which does not run without it.
"""

from __future__ import annotations

import dataclasses
import types
from typing import Any, NoReturn, dataclass_transform


@dataclass_transform(kw_only_default=False)
class Struct:
    """Base of the messages. Fields and defaults as msgspec has them; `tag` and other options of the encoding are ignored."""

    def __init_subclass__(cls, frozen: bool = False, kw_only: bool = False, **encoding: Any) -> None:
        dataclasses.dataclass(frozen=frozen, kw_only=kw_only)(cls)


class _Codec:
    """Takes any arguments; raises when it is used."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None: ...

    def _refuse(self, value: Any) -> NoReturn:
        raise ImportError("msgspec is missing: messages can't be encoded or decoded here; pip install msgspec")

    encode = decode = _refuse


msgpack = types.SimpleNamespace(Encoder=_Codec, Decoder=_Codec)
json = types.SimpleNamespace(Encoder=_Codec, Decoder=_Codec)
structs = types.SimpleNamespace(replace=dataclasses.replace, asdict=dataclasses.asdict)
