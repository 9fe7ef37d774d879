"""The items of the Responses API: those of a request become a conversation's messages, parts of a reply become items and events.

Nothing is kept between requests, so that a conversation comes whole each time, reasoning included.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

from toka.errors import RequestError
from toka.server.reply_deltas import new_call_id
from toka.text.reply_parts import CallArguments, CallBegin, Content, Part, Reasoning

Status = Literal["in_progress", "completed", "incomplete"]

# ------------------------------------------------------------------------------------------------------------- requests


class _InputText(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="input_text"):
    text: str


class _OutputText(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class _Refusal(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="refusal"):
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


_Content = str | list[_InputText | _OutputText | _Refusal]


class _Echoed(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What items of an earlier response carry, and what does not matter here."""

    type: str = "message"
    id: str | None = None
    status: str | None = None


class _Message(_Echoed, kw_only=True):
    role: Literal["user", "assistant", "system", "developer"]
    content: _Content
    phase: str | None = None


class _FunctionCall(_Echoed, kw_only=True):
    call_id: str
    name: str
    arguments: str


class _FunctionCallOutput(_Echoed, kw_only=True):
    call_id: str
    output: _Content


class _ReasoningItem(_Echoed, kw_only=True):
    summary: list[dict[str, Any]] = msgspec.field(default_factory=list)
    content: list[dict[str, Any]] | None = None
    encrypted_content: None = None


_ITEMS: dict[str, type[_Echoed]] = {
    "message": _Message,
    "function_call": _FunctionCall,
    "function_call_output": _FunctionCallOutput,
    "reasoning": _ReasoningItem,
}


def messages_of_items(items: str | Sequence[dict[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation. What the assistant did between two others' turns is one message. RequestError names the item at fault."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for place, raw in enumerate(items):
        match _parsed(raw, place):
            case _Message(role="assistant", content=content):
                turn = _assistant_turn(messages, wants="content")
                turn["content"] = _text_of(content)
            case _Message(role=role, content=content):
                messages.append({"role": role, "content": _text_of(content)})
            case _FunctionCall(call_id=call_id, name=name, arguments=arguments):
                turn = _assistant_turn(messages, wants="tool_calls")
                function = {"name": name, "arguments": arguments}
                turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
            case _FunctionCallOutput(call_id=call_id, output=output):
                messages.append({"role": "tool", "tool_call_id": call_id, "content": _text_of(output)})
            case _ReasoningItem(content=content):
                turn = _assistant_turn(messages, wants="reasoning")
                turn["reasoning"] = "\n".join(str(part.get("text", "")) for part in content or [])
    return messages


def _parsed(raw: dict[str, Any], place: int) -> _Echoed:
    kind = raw.get("type", "message")
    schema = _ITEMS.get(kind) if isinstance(kind, str) else None
    if schema is None:
        raise RequestError(f"input[{place}]: items of type {str(kind)[:40]} are not supported.", "input")
    try:
        return msgspec.convert(raw, schema)
    except msgspec.ValidationError as error:
        raise RequestError(f"input[{place}]: {str(error)[:200]}.", "input") from None


def _assistant_turn(messages: list[dict[str, Any]], wants: str) -> dict[str, Any]:
    """The assistant's message that this belongs to: the last one, if it can still take it in, or a new one."""
    order = ("reasoning", "content", "tool_calls")
    if messages and messages[-1]["role"] == "assistant":
        last = messages[-1]
        taken = [name for name in order if last.get(name)]
        if not taken or order.index(wants) > order.index(taken[-1]) or wants == taken[-1] == "tool_calls":
            return last
    messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text_of(content: _Content) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


# -------------------------------------------------------------------------------------------------------------- replies

Event = dict[str, Any]


class OutputItems:
    """The items of one response while its parts come in: reasoning, messages, function calls. items: so far, the last one maybe open."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False

    def take(self, parts: Sequence[Part]) -> Iterator[Event]:
        """The events that these parts make, without their sequence numbers."""
        for part in parts:
            match part:
                case Reasoning(text):
                    yield from self._open("reasoning")
                    yield self._add_text("response.reasoning_text.delta", text)
                case Content(text):
                    yield from self._open("message")
                    yield {**self._add_text("response.output_text.delta", text), "logprobs": []}
                case CallBegin(name=name):
                    yield from self._close("completed")
                    yield from self._begin(_new_call(name))
                case CallArguments(text=text):
                    self.items[-1]["arguments"] += text
                    yield {"type": "response.function_call_arguments.delta", **self._place(), "delta": text}

    def finish(self, status: Status) -> Iterator[Event]:
        """The last item ends so. A response that says nothing has one empty message."""
        if not self.items:
            yield from self._open("message")
        yield from self._close(status)

    def _open(self, kind: Literal["reasoning", "message"]) -> Iterator[Event]:
        """Go on in an item of that kind, or begin one."""
        if self._is_open and self.items[-1]["type"] == kind:
            return
        yield from self._close("completed")
        yield from self._begin(_new_message() if kind == "message" else _new_reasoning())
        part = _new_part(kind)
        self.items[-1]["content"].append(part)
        yield {"type": "response.content_part.added", **self._place(), "content_index": 0, "part": dict(part)}

    def _begin(self, item: dict[str, Any]) -> Iterator[Event]:
        self.items.append(item)
        self._is_open = True
        place = self._place()
        yield {
            "type": "response.output_item.added",
            "output_index": place["output_index"],
            "item": {**item, **({"content": []} if "content" in item else {})},
        }

    def _add_text(self, kind: str, text: str) -> Event:
        self.items[-1]["content"][0]["text"] += text
        return {"type": kind, **self._place(), "content_index": 0, "delta": text}

    def _close(self, status: Status) -> Iterator[Event]:
        if not self._is_open:
            return
        item, place = self.items[-1], self._place()
        self._is_open = False
        item["status"] = status
        if item["type"] == "function_call":
            yield {
                "type": "response.function_call_arguments.done",
                **place,
                "name": item["name"],
                "arguments": item["arguments"],
            }
        else:
            [part] = item["content"]
            if item["type"] == "message":
                done = {
                    "type": "response.output_text.done",
                    **place,
                    "content_index": 0,
                    "text": part["text"],
                    "logprobs": [],
                }
            else:
                done = {"type": "response.reasoning_text.done", **place, "content_index": 0, "text": part["text"]}
            yield done
            yield {"type": "response.content_part.done", **place, "content_index": 0, "part": part}
        yield {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}

    def _place(self) -> dict[str, Any]:
        """Where the last item is."""
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1}


def _new_message() -> dict[str, Any]:
    return {
        "type": "message",
        "id": f"msg_{uuid.uuid4().hex}",
        "role": "assistant",
        "status": "in_progress",
        "content": [],
    }


def _new_reasoning() -> dict[str, Any]:
    return {"type": "reasoning", "id": f"rs_{uuid.uuid4().hex}", "status": "in_progress", "summary": [], "content": []}


def _new_call(name: str) -> dict[str, Any]:
    return {
        "type": "function_call",
        "id": f"fc_{uuid.uuid4().hex}",
        "status": "in_progress",
        "call_id": new_call_id(),
        "name": name,
        "arguments": "",
    }


def _new_part(kind: Literal["reasoning", "message"]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
