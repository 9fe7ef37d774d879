"""Who may call: the API keys and the admin key."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from starlette.datastructures import Headers

from toka.config import Config
from toka.errors import ConfigError


class Caller(NamedTuple):
    """Who sent a request. owner: stands for its key and tells nothing of it; "" where no key is asked for. is_admin: may touch what
    belongs to others."""

    owner: str
    is_admin: bool


ANYBODY = Caller("", is_admin=False)


class KeyRing:
    """The keys of one server. Where there is no API key, everybody may call, and what anybody makes belongs to all."""

    def __init__(self, api_keys: Iterable[str], admin_key: str | None):
        self._api_keys = [_digest(key.encode()) for key in dict.fromkeys(api_keys)]
        self._admin_key = None if admin_key is None else _digest(admin_key.encode())

    @classmethod
    def of(cls, config: Config) -> KeyRing:
        """Those that the flags name. ConfigError if the file of keys cannot be read or has none."""
        keys = [] if config.api_key_file is None else _keys_in(config.api_key_file)
        if (key := config.effective_api_key()) is not None:
            keys.append(key)
        return cls(keys, config.effective_admin_key())

    def caller(self, key: str) -> Caller | None:
        """Who shows this key ("": none); None = nobody who may call. The time it takes does not depend on how much of a key is right,
        nor on which one it is."""
        digest = _digest(key.encode("latin-1"))  # as headers are read, so that a key may have any characters
        found = [hmac.compare_digest(digest, key) for key in self._api_keys]
        if self._admin_key is not None and hmac.compare_digest(digest, self._admin_key):
            return Caller(_owner(digest), is_admin=True)
        if not self._api_keys:
            return ANYBODY
        return Caller(_owner(digest), is_admin=False) if any(found) else None


def shown_key(headers: Headers) -> str:
    """The key in `Authorization: Bearer KEY` or, as Anthropic's clients send it, `x-api-key: KEY`; "" without."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _owner(digest: bytes) -> str:
    return digest.hex()[:16]


def _keys_in(path: str) -> list[str]:
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file={path}: cannot be read: {error}") from None
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file={path}: holds no key; put one on each line")
    return keys
