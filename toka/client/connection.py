"""Reaching the server, and saying so where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from openai import APIConnectionError, APIError, APIStatusError, OpenAI

from toka.config import Config
from toka.errors import TokaError

_TIMEOUT_S = 600.0


class ServerFailedError(TokaError):
    """The server cannot be reached, refuses or breaks off; the message is one line for the person who asked."""


def connect(host: str, port: int, api_key: str | None, retries: int) -> OpenAI:
    """A client of the server there. api_key: None takes the environment's, if there is one."""
    key = Config(api_key=api_key).effective_api_key() or "none"
    where = f"[{host}]" if ":" in host else host
    return OpenAI(base_url=f"http://{where}:{port}/v1", api_key=key, max_retries=retries, timeout=_TIMEOUT_S)


@contextlib.contextmanager
def failures_explained(host: str, port: int) -> Iterator[None]:
    """Turn whatever fails inside, at the server or on the way to it, into a ServerFailedError."""
    try:
        yield
    except APIConnectionError as error:
        if type(error.__cause__).__name__ == "ConnectError":
            raise ServerFailedError(f"no server answers at {host}:{port}; start one with `toka`") from error
        raise ServerFailedError(f"the connection to {host}:{port} was lost ({error})") from error
    except APIStatusError as error:
        raise ServerFailedError(f"the server answered {error.status_code}: {error.message}") from error
    except APIError as error:
        raise ServerFailedError(f"the server broke off: {error.message}") from error
    except Exception as error:
        # A connection lost in mid-stream comes as an error of the HTTP library, which one depends on openai's version.
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2"):
            raise
        raise ServerFailedError(f"the connection to {host}:{port} was lost ({error})") from error
