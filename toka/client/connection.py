"""Reaching the server, and saying so where that fails."""

from __future__ import annotations

from openai import APIConnectionError, APIError, APIStatusError, OpenAI

from toka.config import Config

_TIMEOUT_S = 600.0


def connect(host: str, port: int, api_key: str | None, retries: int) -> OpenAI:
    """A client of the server there. api_key: None takes the environment's, if there is one."""
    key = Config(api_key=api_key).effective_api_key() or "none"
    where = f"[{host}]" if ":" in host else host
    return OpenAI(base_url=f"http://{where}:{port}/v1", api_key=key, max_retries=retries, timeout=_TIMEOUT_S)


def explain(error: APIError, host: str, port: int) -> str:
    """error in one line for the person who asked."""
    if isinstance(error, APIConnectionError):
        return f"no server answers at {host}:{port}; start one with `toka`"
    if isinstance(error, APIStatusError):
        return f"the server answered {error.status_code}: {error.message}"
    return f"the server broke off: {error.message}"
