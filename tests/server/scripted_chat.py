"""Servers whose model knows of tools and reasoning, and says what the test wrote down for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from byte_tokenizer import EOS_ID
from fake_engine import Behaviour

from toka.messages import Submit, unpack_tokens

TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}\n{% endif %}"
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
"""Hermes' form of calls; reasoning that the prompt begins if enable_thinking is true."""


def says(*replies: str | Callable[[str], str], marks: Sequence[str] = ()) -> Behaviour:
    """An engine that gives each request the next of these texts (the last one again and again), and then the end token.

    A reply may be a function of the prompt's text. marks: the tokenizer's special tokens after <eos>, which are written as such.
    """
    turns = iter(replies)
    latest = replies[0]

    def reply(submit: Submit, sample: int) -> list[int]:
        nonlocal latest
        if sample == 0:
            latest = next(turns, latest)
        prompt = bytes(token for token in unpack_tokens(submit.prompt).tolist() if token < 256).decode()
        return [*_tokens(latest if isinstance(latest, str) else latest(prompt), marks), EOS_ID]

    return Behaviour(reply=reply, vocab_size=EOS_ID + 1 + len(marks), max_request_tokens=20_000)


def _tokens(text: str, marks: Sequence[str]) -> list[int]:
    for number, mark in enumerate(marks):
        if mark in text:
            before, after = text.split(mark, 1)
            return [*_tokens(before, marks), EOS_ID + 1 + number, *_tokens(after, marks)]
    return list(text.encode())


def prompt_of(submit: Submit) -> str:
    """The prompt's text; marks are left out."""
    return bytes(token for token in unpack_tokens(submit.prompt).tolist() if token < 256).decode()
