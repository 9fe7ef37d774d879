"""/v1/messages through Anthropic's client: blocks in, blocks out, the events of a stream."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from fake_engine import Behaviour
from llguidance import LLMatcher
from running_server import RunningServer
from scripted_chat import prompt_of, says

HI = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"name": "get_weather", "description": "Tells it.", "input_schema": PARAMETERS}
NOW = {"name": "now", "input_schema": {"type": "object"}}
OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
every_form = pytest.mark.parametrize("stream", [False, True])


def client(server: RunningServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=20)


def message(server: RunningServer, stream: bool, **fields: Any) -> Any:
    """The reply; in a stream as the client's own accumulator joins it."""
    fields = {"model": "default", "messages": HI, "max_tokens": 200, **fields}
    if not stream:
        return client(server).messages.create(**fields)
    with client(server).messages.stream(**fields) as events:
        return events.get_final_message()


@every_form
def test_a_text(server: RunningServer, stream: bool) -> None:
    reply = message(server, stream, system=[{"type": "text", "text": "Be brief."}], max_tokens=11)
    assert (reply.type, reply.role, reply.stop_reason, reply.stop_sequence) == (
        "message",
        "assistant",
        "max_tokens",
        None,
    )
    assert [(block.type, block.text) for block in reply.content] == [("text", "[system]Be ")]
    usage = reply.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (35, 3, 11)


@every_form
def test_a_stop_sequence(server: RunningServer, stream: bool) -> None:
    reply = message(server, stream, stop_sequences=["zz", "]h"])
    assert (reply.stop_reason, reply.stop_sequence, reply.content[0].text) == ("stop_sequence", "]h", "[user")


@every_form
def test_thinking_text_and_calls(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says(f"<think>Hm.</think>I look.\n{OSLO}\n{TIME}", "<think>x</think>Fine."))
    reply = message(server, stream, tools=[WEATHER, NOW])
    assert reply.stop_reason == "tool_use"
    thinking, text, weather, now = reply.content
    assert (thinking.type, thinking.thinking, text.text) == ("thinking", "Hm.", "I look.")
    assert (weather.type, weather.name, weather.input, now.input) == ("tool_use", "get_weather", {"city": "Oslo"}, {})
    results = [
        {"type": "tool_result", "tool_use_id": weather.id, "content": [{"type": "text", "text": "7 degrees"}]},
        {"type": "tool_result", "tool_use_id": now.id, "content": "noon", "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    turns = [*HI, {"role": "assistant", "content": reply.content}, {"role": "user", "content": results}]
    last = message(server, stream, tools=[WEATHER, NOW], messages=turns)
    assert (last.stop_reason, last.content[-1].text) == ("end_turn", "Fine.")
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    now_call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert prompt_of(server.engine.submitted()[-1]).endswith(
        f"[user]hi\n[assistant]<think>Hm.</think>I look.{call}{now_call}\n[tool]7 degrees\n[tool]Error: noon\n[user]Go on.\n[assistant]"
    )


def test_the_events_of_a_stream(start_chat_server) -> None:
    server = start_chat_server(says(f"<think>Hm</think>Hi{TIME}"))
    body = {"messages": HI, "tools": [NOW], "stream": True, "max_tokens": 200}
    text = server.post("/v1/messages", body).text
    blocks = [block.split("\n") for block in text.removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    told = [(event["type"], event.get("index")) for event in events]
    block = ("content_block_start", "content_block_delta", "content_block_stop")
    assert [each for each, before in zip(told, [None, *told], strict=False) if each != before] == [
        ("message_start", None),
        *((kind, index) for index in range(3) for kind in block),
        ("message_delta", None),
        ("message_stop", None),
    ]
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] > 0
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == len(f"<think>Hm</think>Hi{TIME}") + 1


@every_form
def test_a_call_that_is_cut_off(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says(OSLO))
    body = {"messages": HI, "tools": [WEATHER], "max_tokens": len(OSLO) - 18, "stream": stream}
    reply = server.post("/v1/messages", body)
    assert '"stop_reason":"max_tokens"' in reply.text
    if not stream:
        [block] = reply.json()["content"]
        assert block["type"] == "text" and block["text"].startswith('get_weather({"city": "O')


def test_a_last_message_of_the_assistant_is_continued(server: RunningServer) -> None:
    message(server, False, messages=[*HI, {"role": "assistant", "content": "Sure: "}], max_tokens=1)
    assert prompt_of(server.engine.submitted()[-1]) == "[user]hi\n[assistant]Sure: "


def _grammar(server: RunningServer, **fields: Any) -> str:
    message(server, False, max_tokens=1, **fields)
    structured = server.engine.submitted()[-1].sampling.structured
    assert structured.kind == "lark" and not LLMatcher.validate_grammar(structured.source)
    return structured.source


def test_what_is_asked_is_enforced_by_grammar(start_chat_server, server: RunningServer) -> None:
    marks = ["<think>", "</think>"]
    chatty = start_chat_server(says("x", marks=marks), marks=marks)
    tools = {"tools": [WEATHER, NOW]}
    assert "get_weather" in _grammar(chatty, **tools, tool_choice={"type": "any"})
    assert "get_weather" not in _grammar(chatty, **tools, tool_choice={"type": "tool", "name": "now"})
    assert _grammar(chatty, **tools, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert _grammar(chatty, tools=[{**WEATHER, "strict": True}])
    assert "[max_tokens=1500]" in _grammar(chatty, thinking={"type": "enabled", "budget_tokens": 1500})
    message(chatty, False, thinking={"type": "disabled"}, max_tokens=1)
    assert not prompt_of(chatty.engine.submitted()[-1]).endswith("<think>\n")
    message(chatty, False, **tools, tool_choice={"type": "none"}, max_tokens=1)
    assert chatty.engine.submitted()[-1].sampling.structured is None
    schema = {"output_config": {"format": {"type": "json_schema", "schema": PARAMETERS}}}
    message(server, False, max_tokens=1, extra_body=schema)
    structured = server.engine.submitted()[-1].sampling.structured
    assert (structured.kind, json.loads(structured.source)) == ("json_schema", PARAMETERS)
    message(server, False, max_tokens=1, thinking={"type": "disabled"})  # as it is


def test_tokens_are_counted(server: RunningServer) -> None:
    counted = client(server).messages.count_tokens(model="default", messages=HI, system="Be brief.")
    reply = message(server, False, system="Be brief.", max_tokens=1)
    assert counted.input_tokens == reply.usage.input_tokens + reply.usage.cache_read_input_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "1"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 3000}]}, "messages"),
        ({"messages": [*HI, {"role": "assistant", "content": []}]}, "messages"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}, "output_config"),
        ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "thinking"),
        ({"thinking": {"type": "enabled"}}, "thinking"),
        ({"thinking": {"type": "adaptive", "budget_tokens": 5}}, "thinking"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"container": "x"}, "container"),
        ({"output_config": {"effort": "low"}}, "output_config"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_refused_by_name_and_in_anthropics_form(
    server: RunningServer, fields: dict[str, Any], param: str
) -> None:
    reply = server.post("/v1/messages", {"messages": HI, "max_tokens": 5, **fields})
    body = reply.json()
    assert (reply.status_code, body["type"], body["error"]["type"]) == (400, "error", "invalid_request_error")
    assert body["error"]["param"] == param and param in body["error"]["message"], body


def test_errors_are_those_that_the_client_knows(server: RunningServer, start_server) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        message(server, False, model="other")
    failing = start_server(Behaviour(error_at_token=2, step_s=0.1))
    with pytest.raises(anthropic.InternalServerError):
        message(failing, False)
    with pytest.raises(anthropic.APIStatusError, match="could not go on"):
        message(failing, True)


def test_deep_values_are_refused(server: RunningServer) -> None:
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": deep}]}
    for fields in (
        {"messages": [*HI, call, *HI]},
        {"output_config": {"format": {"type": "json_schema", "schema": deep}}},
        {"tools": [{"name": "f", "input_schema": {**deep, "type": "object"}}]},
    ):
        reply = server.post("/v1/messages", {"messages": HI, "max_tokens": 1, **fields})
        assert reply.status_code in (200, 400), reply.text
    assert reply.json()["error"]["param"] == "tools"
