"""Anthropic's content blocks: those of a request become a conversation's messages, parts of a reply become blocks and events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from toka.errors import RequestError
from toka.server.reply_deltas import new_call_id
from toka.server.schemas import TextBlock, ThinkingBlock, ToolResultBlock, ToolUseBlock, Turn
from toka.text.reply_parts import CallArguments, CallBegin, Content, Message, Part, Reasoning

Event = dict[str, Any]


def messages_of_turns(turns: Sequence[Turn], system: str | Sequence[TextBlock]) -> list[dict[str, Any]]:
    """The conversation. The results of calls, which stand in the user's turns, become messages of the role tool before the user's own."""
    told = _joined(system)
    messages: list[dict[str, Any]] = [{"role": "system", "content": told}] if told else []
    for place, turn in enumerate(turns):
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        elif turn.role == "user":
            messages += _user_messages(turn.content, place)
        else:
            messages.append(_assistant_message(turn.content, place))
    return messages


_Block = TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock


def _user_messages(blocks: Sequence[_Block], place: int) -> Iterator[dict[str, Any]]:
    texts = []
    for block in blocks:
        match block:
            case ToolResultBlock(tool_use_id=call_id, content=content, is_error=is_error):
                result = ("Error: " if is_error else "") + _joined(content)
                yield {"role": "tool", "tool_call_id": call_id, "content": result}
            case TextBlock(text=text):
                texts.append(text)
            case _:
                raise RequestError(f"messages[{place}]: a user's content holds text and tool_result only.", "messages")
    if texts or not blocks:
        yield {"role": "user", "content": "\n".join(texts)}


def _assistant_message(blocks: Sequence[_Block], place: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for block in blocks:
        match block:
            case TextBlock(text=text):
                message["content"] = (message["content"] or "") + text
            case ThinkingBlock(thinking=thinking):
                message["reasoning"] = message.get("reasoning", "") + thinking
            case ToolUseBlock(id=call_id, name=name, input=arguments):
                function = {"name": name, "arguments": _arguments_of(arguments, place)}
                message.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
            case _:
                raise RequestError(f"messages[{place}]: the assistant's content holds no tool_result.", "messages")
    return message


def _arguments_of(arguments: dict[str, Any], place: int) -> str:
    try:
        return json.dumps(arguments, ensure_ascii=False)
    except RecursionError:
        raise RequestError(f"messages[{place}]: the input of a tool_use is nested too deeply.", "messages") from None


def _joined(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


# -------------------------------------------------------------------------------------------------------------- replies


def blocks_of(message: Message) -> list[dict[str, Any]]:
    """The blocks of a whole reply. A call whose arguments are no JSON object, since they were cut off, stands there as text."""
    blocks: list[dict[str, Any]] = []
    if message.reasoning:
        blocks.append({"type": "thinking", "thinking": message.reasoning, "signature": ""})
    if message.text:
        blocks.append({"type": "text", "text": message.text})
    for call in message.tool_calls:
        arguments = _object_of(call.arguments)
        if arguments is None:
            blocks.append({"type": "text", "text": f"{call.name}({call.arguments}"})
        else:
            blocks.append({"type": "tool_use", "id": new_call_id(), "name": call.name, "input": arguments})
    return blocks


def _object_of(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class BlockEvents:
    """The events of one reply's blocks while its parts come in."""

    def __init__(self) -> None:
        self._index = -1
        self._open: type[Part] | None = None

    def take(self, parts: Sequence[Part]) -> Iterator[Event]:
        """The events that these parts make."""
        for part in parts:
            match part:
                case Reasoning(text):
                    yield from self._in_block(Reasoning, {"type": "thinking", "thinking": "", "signature": ""})
                    yield self._delta({"type": "thinking_delta", "thinking": text})
                case Content(text):
                    yield from self._in_block(Content, {"type": "text", "text": ""})
                    yield self._delta({"type": "text_delta", "text": text})
                case CallBegin(name=name):
                    yield from self.finish()
                    block = {"type": "tool_use", "id": new_call_id(), "name": name, "input": {}}
                    yield from self._in_block(CallArguments, block)
                case CallArguments(text=text):
                    yield self._delta({"type": "input_json_delta", "partial_json": text})

    def finish(self) -> Iterator[Event]:
        """The latest block ends."""
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _in_block(self, kind: type[Part], block: dict[str, Any]) -> Iterator[Event]:
        """Go on in a block of that kind, or begin this one."""
        if self._open is not kind:
            yield from self.finish()
            self._open = kind
            self._index += 1
            yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}
