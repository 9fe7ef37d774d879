"""The ways in which models write tool calls, how to know one from the chat template, and how to read each.

| style | what a call looks like |
|---|---|
| hermes | `<tool_call>{"name": "f", "arguments": {...}}</tool_call>`, again for each call (Hermes, Qwen 2.5 and 3, and our own prompt) |
| llama3_json | the whole reply is `{"name": "f", "parameters": {...}}`, after `<|python_tag|>` or not (Llama 3.1 to 3.3) |
| mistral | `[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]`, or `[TOOL_CALLS]f[ARGS]{...}` since version 11 |
| pythonic | the whole reply is `[f(a=1), g(b="x")]`, in `<|python_start|>` and `<|python_end|>` or not (Llama 3.2 and 4) |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from toka.text.json_calls import IsTool, MalformedCallError, read_arguments, read_call_object
from toka.text.pythonic_calls import read_call_list
from toka.text.reply_parts import PartWriter
from toka.text.text_feed import Reading, TextFeed

ReadCalls = Callable[[TextFeed, PartWriter, IsTool], Reading[None]]


@dataclass(frozen=True)
class CallStyle:
    """marks: any of them opens calls, wherever in the reply it stands. bare: how a reply begins that is calls without a mark; "": there
    are none such, else only those calls count that name a tool of the request.

    read: reads what follows a mark, or the bare reply. repeats_mark: each call has a mark of its own; else all calls follow one.
    all_marks: what has to be seen, though it may be a special token.
    """

    name: str
    marks: tuple[str, ...]
    read: ReadCalls
    bare: str = ""
    more_marks: tuple[str, ...] = ()
    repeats_mark: bool = False

    @property
    def all_marks(self) -> tuple[str, ...]:
        return self.marks + self.more_marks


def _read_hermes(feed: TextFeed, parts: PartWriter, is_tool: IsTool) -> Reading[None]:
    yield from feed.take_space()
    yield from read_call_object(feed, parts, is_tool)
    yield from feed.take_space()
    yield from feed.take_mark("</tool_call>")


def _read_llama3(feed: TextFeed, parts: PartWriter, is_tool: IsTool) -> Reading[None]:
    while True:
        yield from feed.take_space()
        yield from read_call_object(feed, parts, is_tool)
        yield from feed.take_space()
        if not (yield from feed.take_mark(";")):
            return


def _read_mistral(feed: TextFeed, parts: PartWriter, is_tool: IsTool) -> Reading[None]:
    yield from feed.take_space()
    if not (yield from feed.take_mark("[")):
        yield from _read_mistral_named(feed, parts, is_tool)
        return
    while True:
        yield from feed.take_space()
        yield from read_call_object(feed, parts, is_tool)
        yield from feed.take_space()
        separator = yield from feed.take()
        if separator == "]":
            return
        if separator != ",":
            raise MalformedCallError


def _read_mistral_named(feed: TextFeed, parts: PartWriter, is_tool: IsTool) -> Reading[None]:
    """`name[ARGS]{...}`; some versions put `[CALL_ID]id` before the arguments, some nothing."""
    if (yield from feed.peek()) == "{":
        yield from read_call_object(feed, parts, is_tool)
        return
    name = ""
    while (char := (yield from feed.peek())) and char not in "[{\n":
        name += yield from feed.take()
    if (yield from feed.take_mark("[CALL_ID]")):
        while (yield from feed.peek()) not in ("", "["):
            yield from feed.take()
    yield from feed.take_mark("[ARGS]")
    yield from feed.take_space()
    if not is_tool(name.strip()) or (yield from feed.peek()) != "{":
        raise MalformedCallError
    feed.let_go()
    parts.begin_call(name.strip())
    yield from read_arguments(feed, parts.arguments)


def _read_pythonic(feed: TextFeed, parts: PartWriter, is_tool: IsTool) -> Reading[None]:
    yield from feed.take_space()
    yield from read_call_list(feed, parts, is_tool)
    yield from feed.take_space()
    yield from feed.take_mark("<|python_end|>")


STYLES = {
    style.name: style
    for style in (
        CallStyle("hermes", ("<tool_call>",), _read_hermes, more_marks=("</tool_call>",), repeats_mark=True),
        CallStyle("llama3_json", ("<|python_tag|>",), _read_llama3, bare="{"),
        CallStyle("mistral", ("[TOOL_CALLS]",), _read_mistral, more_marks=("[ARGS]", "[CALL_ID]")),
        CallStyle("pythonic", ("<|python_start|>",), _read_pythonic, bare="[", more_marks=("<|python_end|>",)),
    )
}


def style_of_template(source: str) -> CallStyle | None:
    """The style that a chat template teaches its model; None if it is none of ours."""
    if "<tool_call>" in source and "<function=" not in source and "<arg_key>" not in source:
        return STYLES["hermes"]
    if "[TOOL_CALLS]" in source:
        return style_called("mistral", source)
    if "<|python_start|>" in source or "func_name1(" in source:
        return STYLES["pythonic"]
    if "<|python_tag|>" in source or '"parameters": dictionary of argument name' in source:
        return STYLES["llama3_json"]
    return None


def style_called(name: str, source: str) -> CallStyle:
    """The style of that name, in the version that a chat template shows."""
    style = STYLES[name]
    return replace(style, repeats_mark=True) if name == "mistral" and "[ARGS]" in source else style


def read_reply(style: CallStyle, feed: TextFeed, parts: PartWriter, is_tool: IsTool) -> Reading[None]:
    """Content and calls, to the end. is_tool: whether the request has a tool of that name."""
    parts.content((yield from feed.take_space()))
    if style.bare and (yield from feed.peek()) == style.bare:
        yield from _try_calls(style, feed, parts, is_tool, "")
    while True:
        text, mark = yield from feed.take_until(style.marks)
        parts.content(text)
        if mark:
            yield from _try_calls(style, feed, parts, is_tool if style.bare else bool, mark)
        elif not text:
            parts.end_content()
            return


def _try_calls(style: CallStyle, feed: TextFeed, parts: PartWriter, is_tool: IsTool, mark: str) -> Reading[None]:
    """Calls, if there are any; what is none is content, the mark included."""
    num_before = parts.num_calls
    feed.hold()
    try:
        yield from style.read(feed, parts, is_tool)
        feed.let_go()
    except MalformedCallError:
        if parts.num_calls == num_before:
            parts.content(mark)
            feed.rewind()
