"""From the text of a reply, as it comes, to its parts."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from toka.text.reasoning import ReasoningMarks, read_reasoning
from toka.text.reply_parts import Part, PartWriter
from toka.text.text_feed import Reading, TextFeed
from toka.text.tool_calls import CallStyle, read_reply


class PartParser(Protocol):
    """Reads one reply. in_reasoning: whether the next text belongs to the reasoning, as far as is known. num_calls: so far."""

    @property
    def in_reasoning(self) -> bool: ...

    @property
    def num_calls(self) -> int: ...

    def push(self, text: str) -> list[Part]:
        """The parts that are certain with this much more text; special tokens that are marks are spelled out in it."""

    def finish(self) -> list[Part]:
        """The rest, when no more text comes."""


@dataclass(frozen=True)
class ReplyFormat:
    """What to look for in a reply. reasoning: None = there is none. begins_in_reasoning: the prompt says its first mark.

    calls: how tool calls are written; None = they are not looked for. tool_names: of the request.
    """

    reasoning: ReasoningMarks | None = None
    begins_in_reasoning: bool = False
    calls: CallStyle | None = None
    tool_names: Collection[str] = ()

    @property
    def marks(self) -> tuple[str, ...]:
        """What has to be seen in the text though it may be a special token."""
        reasoning = () if self.reasoning is None else (self.reasoning.begin, self.reasoning.end)
        return reasoning + (() if self.calls is None else self.calls.all_marks)

    @property
    def is_plain(self) -> bool:
        """Whether a reply is content and nothing else."""
        return self.reasoning is None and self.calls is None


class ReplyParser:
    """A PartParser for the marks and styles that toka knows by itself."""

    def __init__(self, format: ReplyFormat):
        self._feed = TextFeed()
        self._parts = PartWriter()
        self._format = format
        self.in_reasoning = format.begins_in_reasoning
        self._reading = self._read()
        self._is_over = False

    @property
    def num_calls(self) -> int:
        return self._parts.num_calls

    def push(self, text: str) -> list[Part]:
        """See PartParser."""
        if text:
            self._feed.push(text)
            self._go_on()
        return self._parts.drain()

    def finish(self) -> list[Part]:
        """See PartParser."""
        self._feed.ended = True
        self._go_on()
        return self._parts.drain()

    def _go_on(self) -> None:
        if not self._is_over:
            self._is_over = next(self._reading, True) is True

    def _read(self) -> Reading[None]:
        format = self._format
        if format.reasoning is not None:
            yield from read_reasoning(
                self._feed,
                self._parts,
                format.reasoning,
                begun=format.begins_in_reasoning,
                mark_seen=self._set_in_reasoning,
            )
        if format.calls is not None:
            yield from read_reply(format.calls, self._feed, self._parts, set(format.tool_names).__contains__)
        else:
            yield from self._read_content()

    def _read_content(self) -> Reading[None]:
        while text := (yield from self._feed.take_until(()))[0]:
            self._parts.content(text)
        self._parts.end_content()

    def _set_in_reasoning(self, in_reasoning: bool) -> None:
        self.in_reasoning = in_reasoning
