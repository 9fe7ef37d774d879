"""`toka ping` and `toka chat`: a running server asked through the openai package, as any client would (floor 9)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openai import APIConnectionError, APIError, APIStatusError, OpenAI

from toka.config import Config

if TYPE_CHECKING:
    from toka.cli import ChatFlags, PingFlags

_TIMEOUT_S = 600.0


def ping(flags: PingFlags) -> int:
    """Send the prompt, print what comes and how fast; 0 if all went well, 1 if not."""
    try:
        asked = time.perf_counter()
        pieces = _streamed(flags)
        timing = _print_pieces(pieces, flags, asked)
    except APIError as error:
        print(f"\ntoka: error: {_explain(error, flags.host, flags.port)}", file=sys.stderr)
        return 1
    print(timing.line(flags.n))
    return 0


@dataclass
class _Piece:
    """A chunk of a stream: text of one choice, or (at the end) the number of tokens generated in all."""

    choice: int
    text: str
    num_tokens: int | None = None


@dataclass
class _Timing:
    first_s: float
    total_s: float
    num_tokens: int

    def line(self, num_samples: int) -> str:
        """tokens, tokens/s after the first token, TTFT; for several samples over the whole time."""
        after_first_s = self.total_s - self.first_s
        if num_samples == 1 and self.num_tokens > 1 and after_first_s > 0:
            rate = (self.num_tokens - 1) / after_first_s
        else:
            rate = self.num_tokens / self.total_s
        return (
            f"{self.num_tokens} tokens, {rate:.1f} tokens/s, time to first token {1000 * self.first_s:.0f} ms, "
            f"total {self.total_s:.2f} s"
        )


def _streamed(flags: PingFlags) -> Iterator[_Piece]:
    client = _client(flags.host, flags.port, flags.api_key, flags.retries)
    options: dict[str, Any] = {
        "model": flags.model,
        "max_tokens": flags.max_tokens,
        "temperature": flags.temperature,
        "n": flags.n,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chunks: Iterable[Any]
    if flags.chat:
        chunks = client.chat.completions.create(messages=[{"role": "user", "content": flags.prompt}], **options)
    else:
        chunks = client.completions.create(prompt=flags.prompt, **options)
    for chunk in chunks:
        for choice in chunk.choices:
            if flags.chat and choice.delta.role:
                continue  # announces the speaker; no token yet
            yield _Piece(choice.index, (choice.delta.content if flags.chat else choice.text) or "")
        if chunk.usage is not None:
            yield _Piece(0, "", chunk.usage.completion_tokens)


def _print_pieces(pieces: Iterator[_Piece], flags: PingFlags, asked: float) -> _Timing:
    first_s = total_s = 0.0
    num_tokens = 0
    texts = [""] * flags.n
    for piece in pieces:
        total_s = time.perf_counter() - asked
        first_s = first_s or total_s
        num_tokens = piece.num_tokens or num_tokens
        if flags.n == 1 and not flags.hide:
            print(piece.text, end="", flush=True)
        texts[piece.choice] += piece.text
    if not flags.hide:
        print("\n" if flags.n == 1 else "\n".join(f"--- {i}\n{text}" for i, text in enumerate(texts)) + "\n")
    return _Timing(first_s, total_s, num_tokens)


def chat(flags: ChatFlags) -> int:
    """Read questions from stdin and answer them, each with all that was said before; 1 if the server fails."""
    client = _client(flags.host, flags.port, flags.api_key, 0)
    messages: list[Any] = [{"role": "system", "content": flags.system}] if flags.system else []
    for question in _questions():
        messages.append({"role": "user", "content": question})
        options: dict[str, Any] = {} if flags.max_tokens is None else {"max_tokens": flags.max_tokens}
        answer = ""
        try:
            for chunk in client.chat.completions.create(
                model=flags.model, messages=messages, temperature=flags.temperature, stream=True, **options
            ):
                piece = chunk.choices[0].delta.content or ""
                print(piece, end="", flush=True)
                answer += piece
        except APIError as error:
            print(f"\ntoka: error: {_explain(error, flags.host, flags.port)}", file=sys.stderr)
            return 1
        print()
        messages.append({"role": "assistant", "content": answer})
    return 0


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question:
            yield question


def _client(host: str, port: int, api_key: str | None, retries: int) -> OpenAI:
    key = Config(api_key=api_key).effective_api_key() or "none"
    where = f"[{host}]" if ":" in host else host
    return OpenAI(base_url=f"http://{where}:{port}/v1", api_key=key, max_retries=retries, timeout=_TIMEOUT_S)


def _explain(error: APIError, host: str, port: int) -> str:
    if isinstance(error, APIConnectionError):
        return f"no server answers at {host}:{port}; start one with `toka`"
    if isinstance(error, APIStatusError):
        return f"the server answered {error.status_code}: {error.message}"
    return f"the server broke off: {error.message}"
