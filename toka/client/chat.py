"""`toka chat`: a conversation at the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from openai import OpenAI

from toka.client.connection import ServerFailedError, connect, failures_explained
from toka.client.flags import ChatFlags


def chat(flags: ChatFlags) -> int:
    """Read questions from stdin and answer them, each with all that was said before; 1 if the server fails."""
    client = connect(flags.host, flags.port, flags.api_key, 0)
    messages: list[Any] = [{"role": "system", "content": flags.system}] if flags.system else []
    for question in _questions():
        messages.append({"role": "user", "content": question})
        try:
            with failures_explained(flags.host, flags.port):
                answer = _print_answer(client, messages, flags)
        except ServerFailedError as error:
            print(f"\ntoka: error: {error}", file=sys.stderr)
            return 1
        messages.append({"role": "assistant", "content": answer})
    return 0


def _print_answer(client: OpenAI, messages: list[Any], flags: ChatFlags) -> str:
    options: dict[str, Any] = {} if flags.max_tokens is None else {"max_tokens": flags.max_tokens}
    answer = ""
    for chunk in client.chat.completions.create(
        model=flags.model, messages=messages, temperature=flags.temperature, stream=True, **options
    ):
        piece = chunk.choices[0].delta.content or ""
        print(piece, end="", flush=True)
        answer += piece
    print()
    return answer


def _questions() -> Iterator[str]:
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question:
            yield question
