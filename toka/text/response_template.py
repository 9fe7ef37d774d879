"""Replies read by the `response_template` that comes with a tokenizer, through transformers' ResponseParser.

transformers is imported only for a tokenizer that has such a template (a second or two, without torch).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from toka.errors import ConfigError
from toka.text.reply_parts import Part, PartWriter

_REASONING_FIELDS = ("thinking", "reasoning", "reasoning_content")
_CALLS_FIELD = "tool_calls"


class ResponseTemplate:
    """One tokenizer's template. Raises ConfigError if it cannot be used."""

    def __init__(self, source: dict[str, Any]):
        try:
            from transformers.utils.chat_parsing import ResponseParser
            from transformers.utils.chat_parsing.response_templates import load_response_template
        except ImportError as error:
            raise ConfigError(
                "the tokenizer has a response_template, which this version of transformers cannot read; upgrade it, or choose "
                "tool_call_parser= by hand"
            ) from error
        try:
            self._spec = load_response_template(source)
        except ValueError as error:
            raise ConfigError(f"the tokenizer's response_template is not valid: {error}") from error
        self._parser = ResponseParser

    def parser(self, prompt: str, tools: Sequence[dict[str, Any]]) -> ResponseTemplateParser:
        """A parser of one reply. prompt: its text, of which the template may need the end. tools: as in OpenAI's API."""
        return ResponseTemplateParser(lambda: self._parser(self._spec, prefix=prompt, tools=list(tools)))


class ResponseTemplateParser:
    """A PartParser (see reply_parser.py). A call is passed on once it is whole."""

    def __init__(self, new_parser: Callable[[], Any]):
        self._parser = new_parser()
        self._parts = PartWriter()
        self._region: str | None = None
        self._raw_calls = ""
        self._is_broken = False
        for event in self._parser.initial_events:  # regions that the prompt began; their text there is not the reply's
            self._region = event["field"] if event["type"] == "region_open" else self._region
            self._region = None if event["type"] == "region_close" else self._region

    @property
    def in_reasoning(self) -> bool:
        return self._region in _REASONING_FIELDS

    @property
    def num_calls(self) -> int:
        return self._parts.num_calls

    def push(self, text: str) -> list[Part]:
        """See PartParser."""
        self._take(text, lambda: self._parser.feed(text))
        return self._parts.drain()

    def finish(self) -> list[Part]:
        """See PartParser."""
        self._take("", lambda: self._parser.finalize()[1])
        self._parts.end_content()
        return self._parts.drain()

    def _take(self, text: str, events: Callable[[], list[dict[str, Any]]]) -> None:
        """A reply that does not fit its template (calls that are no JSON) is content from there on."""
        if self._is_broken:
            self._parts.content(text)
            return
        try:
            for event in events():
                self._take_event(event)
        except (ValueError, KeyError, TypeError, AttributeError):
            self._is_broken = True
            self._parts.content(self._raw_calls + text)

    def _take_event(self, event: dict[str, Any]) -> None:
        field = event["field"]
        match event["type"]:
            case "region_open":
                self._region, self._raw_calls = field, ""
            case "region_chunk" if field in _REASONING_FIELDS:
                self._parts.reasoning(event["text"])
            case "region_chunk" if field == _CALLS_FIELD:
                self._raw_calls += event["text"]
            case "region_chunk":
                self._parts.content(event["text"])
            case "region_close":
                self._region = None
                if field in _REASONING_FIELDS:
                    self._parts.end_reasoning()
                elif field == _CALLS_FIELD:
                    self._take_calls(event["value"])

    def _take_calls(self, value: Any) -> None:
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call)
            name, arguments = function["name"], function.get("arguments") or {}
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            self._parts.begin_call(str(name))
            self._parts.arguments(arguments)
