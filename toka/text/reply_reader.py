"""A reply while it comes in: its parts for whoever streams, the message made of them for whoever waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from toka.text.reply_parser import PartParser
from toka.text.reply_parts import Message, Part


class ReplyReader:
    """Takes the text of one sample token by token. message: all parts so far. num_reasoning_tokens: their marks included."""

    __slots__ = ("_parser", "message", "num_reasoning_tokens")

    def __init__(self, parser: PartParser):
        self._parser = parser
        self.message = Message()
        self.num_reasoning_tokens = 0

    def take(self, text: str, *, is_last: bool) -> list[Part]:
        """The parts that are certain with the text of one more token (may be empty); all that are left if it is the last one."""
        was_reasoning = self._parser.in_reasoning
        parts = self._parser.push(text)
        self.num_reasoning_tokens += was_reasoning or self._parser.in_reasoning
        if is_last:
            parts += self._parser.finish()
        self.message.add(parts)
        return parts


@dataclass(frozen=True)
class ReplyReading:
    """How the samples of a request are read. token_bytes: as in `Detokenizer`, marks spelled out."""

    new_parser: Callable[[], PartParser]
    token_bytes: Callable[[int], bytes]

    def reader(self) -> ReplyReader:
        """For one sample."""
        return ReplyReader(self.new_parser())
