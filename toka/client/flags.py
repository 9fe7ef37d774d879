"""The flags of `toka ping` and `toka chat`."""

from __future__ import annotations

import dataclasses

from toka.config import DEFAULT_PORT, flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class PingFlags:
    """The flags of `toka ping`."""

    prompt: str = flag("The three primary colours are", "what to send")
    model: str = flag("default", "model to ask for")
    host: str = flag("127.0.0.1", "the server's address")
    port: int = flag(DEFAULT_PORT, "the server's port")
    chat: bool = flag(False, "send the prompt as a chat message instead of a text to continue")
    max_tokens: int = flag(256, "tokens to generate at most", "tokens")
    n: int = flag(1, "samples; more than one are printed when all are done", "samples")
    temperature: float = flag(0.0, "0 = greedy")
    hide: bool = flag(False, "print the figures only, not the text")
    retries: int = flag(0, "tries more if the server is full or not ready", "tries")
    api_key: str | None = flag(None, "the server's API key; None: $TOKA_API_KEY, if set")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFlags:
    """The flags of `toka chat`."""

    system: str | None = flag(None, "system message")
    model: str = flag("default", "model to ask for")
    host: str = flag("127.0.0.1", "the server's address")
    port: int = flag(DEFAULT_PORT, "the server's port")
    max_tokens: int | None = flag(None, "tokens per answer at most; None: what the context allows", "tokens")
    temperature: float = flag(0.7, "0 = greedy")
    api_key: str | None = flag(None, "the server's API key; None: $TOKA_API_KEY, if set")
