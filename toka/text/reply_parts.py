"""What a model's reply consists of: reasoning, content and tool calls, as they come to light piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple


class Reasoning(NamedTuple):
    """More of the reasoning."""

    text: str


class Content(NamedTuple):
    """More of what is said to the user."""

    text: str


class CallBegin(NamedTuple):
    """A tool call begins; call counts from 0 within the reply."""

    call: int
    name: str


class CallArguments(NamedTuple):
    """More of the JSON text of a call's arguments; begins of other calls may have come since that of this one."""

    call: int
    text: str


Part = Reasoning | Content | CallBegin | CallArguments


@dataclasses.dataclass
class ToolCall:
    """arguments: JSON text. Valid JSON of an object unless the model wrote something else and no grammar held it to its tools."""

    name: str
    arguments: str = ""


@dataclasses.dataclass
class Message:
    """The parts of one reply, joined. content: None where there is a call and nothing else is said."""

    reasoning: str = ""
    text: str = ""
    tool_calls: list[ToolCall] = dataclasses.field(default_factory=list)

    @property
    def content(self) -> str | None:
        return None if self.tool_calls and not self.text else self.text

    def parts(self) -> list[Part]:
        """The message as parts, each of them whole; calls come last."""
        parts: list[Part] = [Reasoning(self.reasoning)] if self.reasoning else []
        if self.text:
            parts.append(Content(self.text))
        for number, call in enumerate(self.tool_calls):
            parts += [CallBegin(number, call.name), CallArguments(number, call.arguments)]
        return parts

    def add(self, parts: Iterable[Part]) -> None:
        for part in parts:
            match part:
                case Reasoning(text):
                    self.reasoning += text
                case Content(text):
                    self.text += text
                case CallBegin(name=name):
                    self.tool_calls.append(ToolCall(name))
                case CallArguments(call, text):
                    self.tool_calls[call].arguments += text


class PartWriter:
    """Where a parser puts parts: joins what belongs together, counts calls.

    Whitespace around reasoning is dropped. Around content it is kept, but for that behind reasoning and around calls.
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._space = ""  # has come, and is put only if more of the same follows
        self._is_fresh = True  # nothing but space since the beginning, the reasoning, or the latest call
        self._has_reasoned = False
        self.num_calls = 0

    def drain(self) -> list[Part]:
        """All that was put here since the last time."""
        parts, self._parts = self._parts, []
        return parts

    def reasoning(self, text: str) -> None:
        """More of the reasoning."""
        if not self._has_reasoned:
            text = text.lstrip()
        if body := self._without_space(text):
            self._put(Reasoning(body))
            self._has_reasoned = True

    def end_reasoning(self) -> None:
        """No more reasoning comes for now."""
        self._has_reasoned, self._is_fresh, self._space = True, True, ""

    def content(self, text: str) -> None:
        """More of the content."""
        if self._is_fresh and (self.num_calls or self._has_reasoned):
            text = text.lstrip()
        if body := self._without_space(text):
            self._put(Content(body))
            self._is_fresh = False

    def _without_space(self, text: str) -> str:
        """The text with the space that was kept before it, without that at its end, which is kept in turn."""
        body = text.rstrip()
        if not body:
            self._space += text
            return ""
        body, self._space = self._space + body, text[len(body) :]
        return body

    def end_content(self) -> None:
        """No more content comes."""
        if self._space and not self.num_calls:
            self._put(Content(self._space))
        self._space = ""

    def begin_call(self, name: str) -> None:
        self._is_fresh, self._space = True, ""
        self._put(CallBegin(self.num_calls, name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        """More of the arguments of the latest call."""
        if text:
            self._put(CallArguments(self.num_calls - 1, text))

    def _put(self, part: Part) -> None:
        last = self._parts[-1] if self._parts else None
        match last, part:
            case (Reasoning(before), Reasoning(text)):
                self._parts[-1] = Reasoning(before + text)
            case (Content(before), Content(text)):
                self._parts[-1] = Content(before + text)
            case (CallArguments(call, before), CallArguments(same, text)) if call == same:
                self._parts[-1] = CallArguments(call, before + text)
            case _:
                self._parts.append(part)
