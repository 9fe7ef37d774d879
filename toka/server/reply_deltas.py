"""A streamed reply's parts as OpenAI's deltas, and a whole reply as its message."""

from __future__ import annotations

import secrets
import string
from collections.abc import Sequence
from typing import Any

from toka.server.generation import Sample, TokenEvent
from toka.server.schemas import AssistantMessage, CalledFunction, ToolCall
from toka.text.reply_parts import CallArguments, CallBegin, Content, Message, Part, Reasoning

_ID_CHARS = string.ascii_letters + string.digits
_ID_LENGTH = 9  # Mistral's templates refuse any other


def new_call_id() -> str:
    """The id of a tool call, in a form that every chat template takes back."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(_ID_LENGTH))


def delta_of(parts: Sequence[Part]) -> dict[str, Any]:
    """What these parts add to the message; a call's first delta has its id and name."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        match part:
            case Reasoning(text):
                delta["reasoning"] = delta["reasoning_content"] = delta.get("reasoning", "") + text
            case Content(text):
                delta["content"] = delta.get("content", "") + text
            case CallBegin(index, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": new_call_id(), "type": "function", "function": function}
            case CallArguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


def said_by(sample: Sample) -> Message:
    """All that the sample says, whole."""
    return Message(text=sample.text) if sample.reader is None else sample.reader.message


def parts_of_event(sample: Sample, event: TokenEvent) -> Sequence[Part]:
    """What one token of the sample adds."""
    if sample.reader is not None:
        return event.parts
    return (Content(event.text),) if event.text else ()


def message_of(sample: Sample) -> AssistantMessage:
    """What the sample says, as chat completions tell it."""
    said = said_by(sample)
    message = AssistantMessage(said.content)
    if said.reasoning:
        message.reasoning = message.reasoning_content = said.reasoning
    if said.tool_calls:
        message.tool_calls = [
            ToolCall(id=new_call_id(), function=CalledFunction(call.name, call.arguments)) for call in said.tool_calls
        ]
    return message


def finish_reason_of(sample: Sample, reason: str | None) -> str | None:
    """The reason as chat completions tell it: a reply that ends with calls ended for their sake."""
    return "tool_calls" if reason == "stop" and said_by(sample).tool_calls else reason
