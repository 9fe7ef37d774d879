"""`response_format` and `structured_outputs`: every form reaches the engine as one grammar, every fault is a 400 that names the field."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import openai
import pytest
from fake_engine import Behaviour
from running_server import RunningServer

from toka.params import MAX_GRAMMAR_BYTES, StructuredOutput

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]}


def grammar_of_last(server: RunningServer) -> StructuredOutput | None:
    return server.engine.submitted()[-1].sampling.structured


@pytest.fixture(scope="module")
def warm(server: RunningServer) -> RunningServer:
    """The process that checks grammars is up."""
    assert server.post("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "a"}}).status_code == 200
    return server


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "description": "d"}}, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "anything"}}, {}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_response_format(warm: RunningServer, response_format: Any, expected: Any, stream: bool) -> None:
    reply = warm.openai.chat.completions.create(
        model="default", messages=HI, max_tokens=3, response_format=response_format, stream=stream
    )
    assert len(list(reply)) > 0
    grammar = grammar_of_last(warm)
    if expected is None:
        assert grammar is None
    else:
        assert grammar is not None and grammar.kind == "json_schema" and json.loads(grammar.source) == expected
    extra = {"response_format": response_format}
    warm.openai.completions.create(model="default", prompt="hi", max_tokens=3, extra_body=extra)
    assert grammar_of_last(warm) == grammar


def test_the_clients_own_parser(warm: RunningServer) -> None:
    """`parse` sends a strict schema of a class."""
    pydantic = pytest.importorskip("pydantic")
    city = pydantic.create_model("City", name=(str, ...), size=(int, ...))
    with pytest.raises((openai.LengthFinishReasonError, pydantic.ValidationError)):  # the fake repeats the prompt
        warm.openai.chat.completions.parse(model="default", messages=HI, max_tokens=3, response_format=city)
    grammar = grammar_of_last(warm)
    assert grammar is not None and set(json.loads(grammar.source)["properties"]) == {"name", "size"}


@pytest.mark.parametrize(
    ("asked", "kind", "source"),
    [
        ({"json": SCHEMA}, "json_schema", None),
        ({"json": json.dumps(SCHEMA)}, "json_schema", None),
        ({"regex": r"\d{3}-\d{4}"}, "regex", r"\d{3}-\d{4}"),
        ({"choice": ["yes", 'n"o', "日本\n"]}, "lark", 'start: "yes" | "n\\"o" | "日本\\n"'),
        ({"grammar": 'start: "a" | "b"'}, "lark", 'start: "a" | "b"'),
    ],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_structured_outputs(warm: RunningServer, endpoint: str, asked: Any, kind: str, source: str | None) -> None:
    extra = {"structured_outputs": asked}
    if endpoint == "chat":
        warm.openai.chat.completions.create(model="default", messages=HI, max_tokens=2, extra_body=extra)
    else:
        warm.openai.completions.create(model="default", prompt=["hi", "ho"], n=2, max_tokens=2, extra_body=extra)
    grammar = grammar_of_last(warm)
    assert grammar is not None and grammar.kind == kind
    assert json.loads(grammar.source) == SCHEMA if source is None else grammar.source == source


def test_gbnf_comes_as_lark(warm: RunningServer) -> None:
    asked = {"grammar": 'root ::= "a" digits\ndigits ::= [0-9]+\n'}
    warm.openai.completions.create(model="default", prompt="hi", max_tokens=2, extra_body={"structured_outputs": asked})
    grammar = grammar_of_last(warm)
    assert grammar is not None and grammar.kind == "lark" and "start:" in grammar.source and "::=" not in grammar.source


def refusal(server: RunningServer, **fields: Any) -> dict[str, Any]:
    began = time.perf_counter()
    reply = server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 2, **fields})
    took_s = time.perf_counter() - began
    assert reply.status_code == 400, (reply.status_code, reply.text[:200])
    # Below 1 s on a machine that does nothing else (a grammar gets half a second of CPU time); unhindered, some would take 30 s.
    assert took_s < 8.0, f"{took_s:.2f} s"
    error: dict[str, Any] = reply.json()["error"]
    assert len(error["message"]) < 500
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "text", "json_schema": {"name": "a"}}}, "response_format"),
        ({"response_format": {"type": "json_object", "extra": 1}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "strin"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"format": "x", "type": "string"}}}},
         "response_format"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs"),
        ({"structured_outputs": {"json": [1]}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": 'root ::= "a'}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_name(warm: RunningServer, fields: dict[str, Any], param: str) -> None:
    before = len(warm.engine.submitted())
    error = refusal(warm, **fields)
    assert error["param"] == param and param in error["message"]
    assert len(warm.engine.submitted()) == before


@pytest.mark.parametrize("name", ["json", "regex", "choice", "grammar"])
def test_the_older_names_say_what_to_write(warm: RunningServer, name: str) -> None:
    error = refusal(warm, **{f"guided_{name}": "a"})
    assert error["param"] == f"guided_{name}" and f'structured_outputs: {{"{name}": ...}}' in error["message"]


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "deep": {"json": nested(200)},
    "deep text": {"json": '{"properties":{"a":' * 5000 + "{}" + "}}" * 5000},
    "huge enum": {"json": {"enum": [f"value {i}" for i in range(200_000)]}},
    "large enum": {"json": {"enum": [f"value {i}" for i in range(20_000)]}},
    "10 MB": {"json": {"const": "ab" * 5_000_000}},
    "many properties": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(8000)}}},
    "refers to itself": {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "product": {
        "json": {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"p{i}": {"const": j}}} for j in range(3)]}
                for i in range(14)
            ]
        }
    },
    "repeats": {"regex": "((a{1000}){1000}){1000}"},
    "repeats behind a choice": {"regex": "(x|y)((a{1000}){1000}){1000}"},
    "10 MB regex": {"regex": "ab" * 5_000_000},
    "parentheses": {"regex": "(" * 20_000 + "a" + ")" * 20_000},
    "lark parentheses": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "a chain of rules": {
        "grammar": "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(15_000)) + 'a15000: "z"'
    },
    "gbnf parentheses": {"grammar": "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "nothing fits": {"grammar": "start: e\ne: e"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_within_a_second_and_nobody_else_notices(warm: RunningServer, name: str) -> None:
    error = refusal(warm, structured_outputs=HOSTILE[name])
    assert error["param"] == "structured_outputs" or "JSON" in error["message"]
    assert warm.post("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": "b+"}}).status_code == 200
    assert warm.get("/health").status_code == 200


def test_catastrophic_regexes_are_none_here(warm: RunningServer) -> None:
    """They are matched without backtracking, so they are only regexes."""
    for regex in ("(a+)+b", "(a|aa)*c", "(x.*){30}y", "[01]*1[01]{40}"):
        reply = warm.post("/v1/completions", {"prompt": "a", "structured_outputs": {"regex": regex}})
        assert reply.status_code == 200, reply.text


def test_plain_requests_do_not_wait_for_hostile_grammars(warm: RunningServer) -> None:
    slow = [{"regex": f"((a{{1000}}){{1000}}){{{1000 + i}}}"} for i in range(6)]
    with ThreadPoolExecutor(len(slow)) as pool:
        replies = [
            pool.submit(warm.post, "/v1/completions", {"prompt": "a", "structured_outputs": each}) for each in slow
        ]
        time.sleep(0.1)
        began = time.perf_counter()
        assert warm.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
        assert time.perf_counter() - began < 1.5  # all of them take longer, two at a time
        assert {reply.result().status_code for reply in replies} <= {400, 503}  # 503: none has time for the last ones


def test_a_checker_that_dies_is_replaced(start_server: Any) -> None:
    server = start_server(Behaviour())
    body = {"prompt": "a", "max_tokens": 2, "structured_outputs": {"regex": "a"}}
    assert server.post("/v1/completions", body).status_code == 200
    server.serving.grammars._process.kill()
    server.wait(lambda: server.serving.grammars._process.returncode is not None)
    assert server.post("/v1/completions", body).status_code == 200  # it is known
    body["structured_outputs"] = {"regex": "b"}
    assert server.post("/v1/completions", body).status_code == 200


def test_a_grammar_may_have_so_many_bytes(warm: RunningServer) -> None:
    error = refusal(warm, structured_outputs={"regex": "a" * (MAX_GRAMMAR_BYTES + 1)})
    assert error["code"] == "grammar_too_large" and str(MAX_GRAMMAR_BYTES) in error["message"]


def test_the_engine_may_send_several_tokens_of_a_request_at_once(start_server: Any) -> None:
    """As it does for forced tokens; a stop string in the midst of them ends the text, and the rest is dropped."""
    server = start_server(Behaviour(tokens_per_step=3))
    fields = {"max_tokens": 9, "structured_outputs": {"regex": "a"}}
    for stream in (False, True):
        plain = server.openai.completions.create(model="default", prompt="abcdefgh", max_tokens=9, stream=stream)
        stopped = server.openai.completions.create(
            model="default", prompt="abcdefgh", max_tokens=9, stop="e", stream=stream,
            extra_body={"structured_outputs": fields["structured_outputs"]},
        )  # fmt: skip
        texts = [
            "".join(chunk.choices[0].text for chunk in reply) if stream else reply.choices[0].text
            for reply in (plain, stopped)
        ]
        assert texts == ["abcdefgha", "abcd"]
    server.wait(lambda: server.serving.engine.num_open == 0)


def test_grammars_travel_as_they_are() -> None:
    grammar = StructuredOutput("json_schema", '{"const": "\\u0000 ü"}')
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(grammar), type=StructuredOutput) == grammar
