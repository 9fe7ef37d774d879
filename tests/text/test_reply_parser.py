"""Replies in every style, cut into pieces in every way: the same parts come out, and nothing too early or too late."""

from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toka.text.reasoning import ReasoningMarks, marks_of_template, prompt_begins_reasoning
from toka.text.reply_parser import ReplyFormat, ReplyParser
from toka.text.reply_parts import CallArguments, CallBegin, Message, Part
from toka.text.tool_calls import STYLES, style_called, style_of_template

THINK = ReasoningMarks("<think>", "</think>")
NAMES = ("get_weather", "now")


def _format(style: str | None, reasoning: ReasoningMarks | None = None, begins: bool = False) -> ReplyFormat:
    return ReplyFormat(reasoning, begins, None if style is None else STYLES[style], NAMES)


def _parts(format: ReplyFormat, pieces: Iterable[str]) -> list[Part]:
    parser = ReplyParser(format)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return parts + parser.finish()


def _message(format: ReplyFormat, pieces: Iterable[str]) -> Message:
    message = Message()
    message.add(_parts(format, pieces))
    return message


def _calls(message: Message) -> list[tuple[str, object]]:
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


OSLO = ("get_weather", {"city": "Oslo", "days": 3})
OSLO_JSON = '{"city": "Oslo", "days": 3}'
OBJECT = '{"name": "get_weather", "arguments": ' + OSLO_JSON + "}"
EMPTY = '{"name": "now", "arguments": {}}'
CASES = [
    # style, reply, content, calls
    ("hermes", "just text <tool> {}", "just text <tool> {}", []),
    ("hermes", f"<tool_call>\n{OBJECT}\n</tool_call>", None, [OSLO]),
    ("hermes", f"Let me see.\n\n<tool_call>\n{OBJECT}\n</tool_call>\n", "Let me see.", [OSLO]),
    (
        "hermes",
        f"<tool_call>{OBJECT}</tool_call>\n<tool_call>{EMPTY}</tool_call>\nDone.",
        "Done.",
        [OSLO, ("now", {})],
    ),
    ("hermes", '<tool_call>{"arguments": {"a": "}\\""}, "id": 7, "name": "x"}</tool_call>', None, [("x", {"a": '}"'})]),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>', None, [("now", {})]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', None, [("now", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("f", {"a": 1})]),
    ("hermes", "<tool_call>\nnot JSON\n</tool_call>", "<tool_call>\nnot JSON\n</tool_call>", []),
    ("hermes", "a <tool_call>[1]</tool_call> b", "a <tool_call>[1]</tool_call> b", []),
    ("hermes", "ends with <tool_c", "ends with <tool_c", []),
    ("llama3_json", '{"name": "get_weather", "parameters": ' + OSLO_JSON + "}", None, [OSLO]),
    ("llama3_json", '<|python_tag|>{"name": "now", "parameters": {}}', None, [("now", {})]),
    (
        "llama3_json",
        '\n{"name": "now", "parameters": {}}; {"parameters": ' + OSLO_JSON + ', "name": "get_weather"}',
        None,
        [("now", {}), OSLO],
    ),
    ("llama3_json", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    ("llama3_json", '{"answer": 42}', '{"answer": 42}', []),
    ("llama3_json", "A brace { is no call.", "A brace { is no call.", []),
    ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("mistral", f"[TOOL_CALLS] [{OBJECT}, {EMPTY}]", None, [OSLO, ("now", {})]),
    ("mistral", f"Yes.[TOOL_CALLS][{OBJECT}]", "Yes.", [OSLO]),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{OSLO_JSON}[TOOL_CALLS]now[ARGS]{{}}", None, [OSLO, ("now", {})]),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]{OSLO_JSON}", None, [OSLO]),
    ("mistral", f"[TOOL_CALLS]get_weather{OSLO_JSON}", None, [OSLO]),
    ("mistral", "[TOOL_CALLS] oh", "[TOOL_CALLS] oh", []),
    ("pythonic", '[get_weather(city="Oslo", days=3), now()]', None, [OSLO, ("now", {})]),
    ("pythonic", "<|python_start|>[now()]<|python_end|>", None, [("now", {})]),
    (
        "pythonic",
        "[now(a=[1, -2.5], b={'k': True, \"l\": null}, c='it\\'s )', d=None)]",
        None,
        [("now", {"a": [1, -2.5], "b": {"k": True, "l": None}, "c": "it's )", "d": None})],
    ),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    ("pythonic", "[see(this=1)]", "[see(this=1)]", []),
    ("pythonic", "[now(1)]", "[now(1)]", []),
    ("pythonic", "[now(a=open('x'))]", "[now(a=open('x'))]", []),
    ("pythonic", "Text [now()]", "Text [now()]", []),
    (None, "  a <tool_call> b \n", "  a <tool_call> b \n", []),
]


@pytest.mark.parametrize(("style", "reply", "content", "calls"), CASES)
def test_every_style_whole_and_in_pieces(style: str | None, reply: str, content: str | None, calls: list) -> None:
    for size in (len(reply), 1, 2, 3, 7):
        message = _message(_format(style), [reply[i : i + size] for i in range(0, len(reply), size)])
        assert (message.content, _calls(message)) == (content, calls), size


@given(st.data())
def test_pieces_do_not_matter(data: st.DataObject) -> None:
    style, reply, _, _ = data.draw(st.sampled_from(CASES))
    format = _format(style, *data.draw(st.sampled_from([(None, False), (THINK, False), (THINK, True)])))
    reply = data.draw(st.sampled_from(["", "<think>hm\n</think>\n\n", "hm </think> "])) + reply
    cuts = sorted(data.draw(st.lists(st.integers(0, len(reply)))))
    pieces = [reply[a:b] for a, b in zip([0, *cuts], [*cuts, len(reply)], strict=True)]
    assert _message(format, pieces) == _message(format, [reply])


@given(st.sampled_from(list(STYLES)), st.text(alphabet='<tool_call>{}[]"\\:,name()=[ARGS] \n|python_tag;1'))
def test_no_text_breaks_a_parser(style: str, reply: str) -> None:
    message = _message(_format(style, THINK), reply)
    assert message == _message(_format(style, THINK), [reply])


def test_arguments_stream_while_they_are_written() -> None:
    parser = ReplyParser(_format("hermes"))
    assert parser.push('I look.\n<tool_call>\n{"name": "get_weather", "arg')[1:] == [CallBegin(0, "get_weather")]
    assert parser.num_calls == 1
    assert parser.push('uments": {"city": "Os') == [CallArguments(0, '{"city": "Os')]
    assert parser.push("lo ") == [CallArguments(0, "lo ")]
    assert parser.push('"}}\n</tool_call>') == [CallArguments(0, '"}')]
    assert parser.finish() == []


def test_a_call_that_is_cut_off_stays_begun() -> None:
    message = _message(_format("hermes"), ['<tool_call>{"name": "now", "arguments": {"a": "b'])
    assert [(call.name, call.arguments) for call in message.tool_calls] == [("now", '{"a": "b')]


@pytest.mark.parametrize(
    ("begins", "reply", "reasoning", "content"),
    [
        (False, "<think>\nWell,\n so\n</think>\n\nHi", "Well,\n so", "Hi"),
        (True, "Well\n</think>\n\nHi ", "Well", "Hi "),
        (True, "<think>\nWell</think>Hi", "Well", "Hi"),
        (True, "never ends", "never ends", ""),
        (False, "no reasoning <think> here</think>", "", "no reasoning <think> here</think>"),
        (False, "  plain", "", "  plain"),
        (True, "\n</think>\n\n", "", ""),
    ],
)
def test_reasoning(begins: bool, reply: str, reasoning: str, content: str) -> None:
    for pieces in ([reply], list(reply)):
        message = _message(_format(None, THINK, begins), pieces)
        assert (message.reasoning, message.content) == (reasoning, content)


def test_reasoning_and_then_a_call_which_reasoning_itself_cannot_contain() -> None:
    reply = f"<think>I could <tool_call>{EMPTY}</tool_call></think>\n<tool_call>{OBJECT}</tool_call>"
    message = _message(_format("hermes", THINK), list(reply))
    assert message.reasoning == f"I could <tool_call>{EMPTY}</tool_call>"
    assert (message.content, _calls(message)) == (None, [OSLO])


def test_in_reasoning_follows_the_marks() -> None:
    parser = ReplyParser(_format(None, THINK))
    states = []
    for piece in ("<thi", "nk>", "a", "</th", "ink>", "b"):
        parser.push(piece)
        states.append(parser.in_reasoning)
    assert states == [False, True, True, True, False, False]
    assert ReplyParser(_format(None, THINK, begins=True)).in_reasoning


def test_marks_and_styles_are_known_by_the_template() -> None:
    assert marks_of_template("{{ content.split('</think>')[-1] }}") == THINK
    assert marks_of_template("[THINK]{{ x }}[/THINK]") == ReasoningMarks("[THINK]", "[/THINK]")
    assert marks_of_template("{{ messages }}") is None
    assert prompt_begins_reasoning("...assistant\n<think>\n", THINK)
    assert not prompt_begins_reasoning("...<think>\n\n</think>\n\n", THINK)
    for source, name in (
        ("a json object within <tool_call></tool_call> tags", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|python_tag|>' }} Environment: ipython", "llama3_json"),
        ("in the format of [func_name1(params_name1=params_value1)]", "pythonic"),
        ("<|python_start|> and <|python_tag|>", "pythonic"),
    ):
        assert style_of_template(source) is STYLES[name]
    assert style_of_template("<tool_call>\n<function=x>") is None
    assert style_of_template("{{ tools }}") is None
    assert style_of_template("[TOOL_CALLS]{{ name }}[ARGS]").repeats_mark
    assert not style_called("mistral", "[TOOL_CALLS]").repeats_mark
