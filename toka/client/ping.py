"""`toka ping`: one prompt, its answer, and how fast it came."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from toka.client.connection import ServerFailedError, connect, failures_explained
from toka.client.flags import PingFlags


def ping(flags: PingFlags) -> int:
    """Send the prompt, print what comes and how fast; 0 if all went well, 1 if not."""
    try:
        with failures_explained(flags.host, flags.port):
            timing = _print_pieces(_streamed(flags), flags, time.perf_counter())
    except ServerFailedError as error:
        print(f"\ntoka: error: {error}", file=sys.stderr)
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
    client = connect(flags.host, flags.port, flags.api_key, flags.retries)
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
