"""Read tool calls that are written as a Python list: `[get_weather(city="Oslo", days=3), now()]`.

A call is passed on once its closing parenthesis is there, since its arguments have to be turned into JSON.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from toka.text.json_calls import IsTool, MalformedCallError
from toka.text.reply_parts import PartWriter
from toka.text.text_feed import Reading, TextFeed

_NAME = re.compile(r"[A-Za-z_][\w.]*")
_CONSTANTS = {"true": True, "false": False, "null": None}  # as JSON has them, which models mix in


def read_call_list(feed: TextFeed, parts: PartWriter, is_tool: IsTool) -> Reading[None]:
    """The whole list. Raises MalformedCallError for what is none; the text can be taken back while no call of it was passed on."""
    if (yield from feed.take()) != "[":
        raise MalformedCallError
    while True:
        yield from feed.take_space()
        name = yield from _read_name(feed)
        if not is_tool(name):
            raise MalformedCallError
        arguments = _arguments((yield from _read_parenthesised(feed)))
        feed.let_go()
        parts.begin_call(name)
        parts.arguments(arguments)
        yield from feed.take_space()
        separator = yield from feed.take()
        if separator == "]":
            return
        if separator != ",":
            raise MalformedCallError


def _read_name(feed: TextFeed) -> Reading[str]:
    name = ""
    while (char := (yield from feed.peek())) and (char.isalnum() or char in "_."):
        name += yield from feed.take()
    if char != "(" or not _NAME.fullmatch(name):
        raise MalformedCallError
    return name


def _read_parenthesised(feed: TextFeed) -> Reading[str]:
    """From an opening parenthesis to its closing one, which one in a string is not."""
    taken, depth, quote = "", 0, ""
    while True:
        char = yield from feed.take()
        if not char:
            raise MalformedCallError
        taken += char
        if quote:
            if char == "\\":
                taken += yield from feed.take()
            elif char == quote:
                quote = ""
        elif char in "\"'":
            quote = char
        else:
            depth += (char in "([{") - (char in ")]}")
            if depth == 0:
                return taken


def _arguments(parenthesised: str) -> str:
    """The keyword arguments as a JSON object."""
    try:
        call = ast.parse("f" + parenthesised, mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise MalformedCallError
        values = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise MalformedCallError from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name) if name in _CONSTANTS:
            return _CONSTANTS[name]
        case ast.List(elts=elements):
            return [_value(element) for element in elements]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {str(_value(key)): _value(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case _:
            return ast.literal_eval(node)
