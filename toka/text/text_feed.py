"""Text that arrives in pieces, for parsers that are written as if it were all there.

A parser is a generator: it takes text from a `TextFeed` with `yield from` and is suspended while there is none. So a grammar of
several states reads from top to bottom, whatever way the text is cut into pieces.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

Result = TypeVar("Result")
Reading = Generator[None, None, Result]
"""A parser or a part of one: suspended while it waits for text, at last returns its result."""


class TextFeed:
    """The text between what a parser has taken and what has arrived.

    ended: no more will come. Since `hold`, what is taken is kept, so that `held` can give it back as text.
    """

    __slots__ = ("_holding", "_position", "_text", "ended")

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._holding = False
        self.ended = False

    def push(self, text: str) -> None:
        if not self._holding:
            self._text, self._position = self._text[self._position :], 0
        self._text += text

    def hold(self) -> None:
        """Keep what is taken from here on."""
        self._text, self._position = self._text[self._position :], 0
        self._holding = True

    def held(self) -> str:
        """What was taken since `hold`; keep no more."""
        text = self._text[: self._position]
        self.let_go()
        return text

    def let_go(self) -> None:
        """Keep no more of what is taken."""
        self._holding = False

    def rewind(self) -> None:
        """Take what was taken since `hold` once more; keep no more."""
        self._position = 0
        self.let_go()

    def peek(self) -> Reading[str]:
        """The next character, which is not taken; "" at the end."""
        while self._position == len(self._text) and not self.ended:
            yield
        return self._text[self._position : self._position + 1]

    def take(self) -> Reading[str]:
        """The next character; "" at the end."""
        char = yield from self.peek()
        self._position += len(char)
        return char

    def take_space(self) -> Reading[str]:
        """All whitespace that comes next, up to the first other character or the end."""
        taken = ""
        while (char := (yield from self.peek())).isspace():
            taken += char
            self._position += 1
        return taken

    def take_mark(self, mark: str) -> Reading[bool]:
        """Take mark if it comes next; else take nothing and return False."""
        while True:
            there = self._text[self._position : self._position + len(mark)]
            if there == mark:
                self._position += len(mark)
                return True
            if self.ended or not mark.startswith(there):
                return False
            yield

    def take_until(self, marks: Sequence[str]) -> Reading[tuple[str, str]]:
        """(some text, the mark behind it): text is what is certain to stand before any of marks; the mark is taken too, or "" if none is
        there yet. ("", "") only at the end."""
        while True:
            if self._position == len(self._text) and not self.ended:
                yield
                continue
            found = [(place, mark) for mark in marks if (place := self._text.find(mark, self._position)) >= 0]
            if found:
                place, mark = min(found, key=lambda each: (each[0], -len(each[1])))
                text = self._text[self._position : place]
                self._position = place + len(mark)
                return text, mark
            end = len(self._text) - (0 if self.ended else self._begun(marks))
            if end > self._position or self.ended:
                text, self._position = self._text[self._position : end], end
                return text, ""
            yield

    def _begun(self, marks: Sequence[str]) -> int:
        """Characters at the end of what has arrived that may be the beginning of a mark."""
        longest = max(map(len, marks), default=1) - 1
        tail = self._text[max(self._position, len(self._text) - longest) :]
        if not any(mark[0] in tail for mark in marks):
            return 0
        lengths = range(len(tail), 0, -1)
        return next((n for n in lengths if any(mark.startswith(tail[-n:]) for mark in marks)), 0)
