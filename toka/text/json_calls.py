"""Read tool calls that are written as JSON objects while they are being written: `{"name": ..., "arguments": {...}}`.

Arguments are passed on as the text they are; nothing is parsed that need not be, so that they stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from toka.text.reply_parts import PartWriter
from toka.text.text_feed import Reading, TextFeed

_NAME_KEYS = ("name",)
_ARGUMENT_KEYS = ("arguments", "parameters")


class MalformedCallError(Exception):
    """The text is no call after all."""


IsTool = Callable[[str], bool]


def read_call_object(feed: TextFeed, parts: PartWriter, is_tool: IsTool) -> Reading[None]:
    """One call object. is_tool: whether there may be a call of that name.

    Raises MalformedCallError for what is no call; whoever has called `feed.hold` before can take the text back, as long as no name was
    read (then this function lets go of the text, since its parts are on their way).
    """
    yield from _expect(feed, "{")
    name: str | None = None
    early, has_arguments = "", False
    while True:
        yield from feed.take_space()
        if name is None and (yield from feed.peek()) == "}":
            raise MalformedCallError
        key = yield from _read_string(feed)
        yield from feed.take_space()
        yield from _expect(feed, ":")
        yield from feed.take_space()
        if key in _NAME_KEYS and name is None:
            name = yield from _read_string(feed)
            if not name or not is_tool(name):
                raise MalformedCallError
            feed.let_go()
            parts.begin_call(name)
            parts.arguments(early)
            has_arguments = bool(early)
        elif key in _ARGUMENT_KEYS and name is not None:
            yield from read_arguments(feed, parts.arguments)
            has_arguments = True
        else:
            value: list[str] = []
            yield from read_value(feed, value.append)
            if key in _ARGUMENT_KEYS:
                early = _as_arguments("".join(value))
        yield from feed.take_space()
        separator = yield from feed.take()
        if separator != ",":
            break
    if separator != "}" or name is None:
        raise MalformedCallError
    if not has_arguments:
        parts.arguments("{}")


def read_arguments(feed: TextFeed, write: Callable[[str], None]) -> Reading[None]:
    """The value of the arguments: an object is written out as it comes; a string that holds JSON, as some models write it, once read."""
    if (yield from feed.peek()) == "{":
        yield from read_value(feed, write)
        return
    value: list[str] = []
    yield from read_value(feed, value.append)
    write(_as_arguments("".join(value)))


def _as_arguments(value: str) -> str:
    if value.startswith('"'):
        return str(_decoded(value))
    return "{}" if value == "null" else value


def read_value(feed: TextFeed, write: Callable[[str], None]) -> Reading[None]:
    """One JSON value, written out character by character; the text is trusted to be JSON as far as its end is to be found."""
    depth = 0
    while True:
        char = yield from feed.peek()
        if not char or (depth == 0 and char in ",]}:"):
            raise MalformedCallError
        if char == '"':
            yield from _copy_string(feed, write)
        elif depth == 0 and char not in "{[":
            write((yield from _read_scalar(feed)))
        else:
            yield from feed.take()
            write(char)
            depth += (char in "{[") - (char in "}]")
        if depth == 0:
            return


def _read_scalar(feed: TextFeed) -> Reading[str]:
    taken = ""
    while (char := (yield from feed.peek())) and not char.isspace() and char not in ',]}:"{[':
        taken += yield from feed.take()
    return taken


def _copy_string(feed: TextFeed, write: Callable[[str], None]) -> Reading[None]:
    """A string with its quotes and escapes, written out as it comes."""
    write((yield from feed.take()))
    while True:
        piece, mark = yield from feed.take_until(('"', "\\"))
        if not piece and not mark:
            raise MalformedCallError
        write(piece + mark)
        if mark == '"':
            return
        if mark:
            write((yield from feed.take()))


def _read_string(feed: TextFeed) -> Reading[str]:
    if (yield from feed.peek()) != '"':
        raise MalformedCallError
    raw: list[str] = []
    yield from _copy_string(feed, raw.append)
    return str(_decoded("".join(raw)))


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise MalformedCallError from None


def _expect(feed: TextFeed, char: str) -> Reading[None]:
    if (yield from feed.take()) != char:
        raise MalformedCallError
