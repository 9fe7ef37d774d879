"""/v1/responses through the official client: items in, items out, the events of a stream in their order."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from fake_engine import Behaviour
from llguidance import LLMatcher
from running_server import RunningServer
from scripted_chat import prompt_of, says

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "description": "Tells it.", "parameters": PARAMETERS}
NOW = {"type": "function", "name": "now", "parameters": None, "strict": None}
OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
every_form = pytest.mark.parametrize("stream", [False, True])


def respond(server: RunningServer, stream: bool, **fields: Any) -> Any:
    """The response; in a stream as the client's own accumulator joins it, which checks the order of events."""
    fields = {"model": "default", "input": "hi", **fields}
    if not stream:
        return server.openai.responses.create(**fields)
    with server.openai.responses.stream(**fields) as events:
        return events.get_final_response()


@every_form
def test_a_text_cut_off(server: RunningServer, stream: bool) -> None:
    fields = {"input": "hi", "instructions": "Be brief.", "max_output_tokens": 12, "metadata": {"a": "b"}}
    response = server.openai.responses.create(model="default", stream=stream, **fields)
    if stream:
        last = list(response)[-1]
        assert last.type == "response.incomplete"
        response = last.response
    assert (response.object, response.status) == ("response", "incomplete")
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "[system]Be b"
    [message] = response.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "incomplete")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (38, 12, 50)
    assert usage.input_tokens_details.cached_tokens == 3
    assert (response.instructions, response.metadata, response.store) == ("Be brief.", {"a": "b"}, False)
    assert response.id.startswith("resp_")


@every_form
@pytest.mark.parametrize("said", ["Hello.", ""])
def test_a_text(start_chat_server, stream: bool, said: str) -> None:
    response = respond(start_chat_server(says(said)), stream)
    assert (response.status, response.output_text, len(response.output)) == ("completed", said, 1)


@every_form
def test_reasoning_text_and_calls(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says(f"<think>Hm.</think>I look.\n{OSLO}\n{TIME}"))
    response = respond(server, stream, tools=[WEATHER, NOW])
    assert response.status == "completed"
    reasoning, message, weather, now = response.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "Hm.", [])
    assert (message.type, message.content[0].text) == ("message", "I look.")
    assert (weather.type, weather.name, json.loads(weather.arguments)) == (
        "function_call",
        "get_weather",
        {"city": "Oslo"},
    )
    assert (now.name, now.arguments, now.status) == ("now", "{}", "completed")
    assert len({item.id for item in response.output}) == 4 and weather.call_id != now.call_id
    assert response.usage.output_tokens_details.reasoning_tokens == len("Hm.</think>") + 1
    assert '"parameters": {"type": "object", "properties": {}}' in prompt_of(server.engine.submitted()[-1])


def test_the_events_of_a_stream(start_chat_server) -> None:
    server = start_chat_server(says(f"<think>Hm</think>Hi{TIME}"))
    text = server.post("/v1/responses", {"input": "hi", "tools": [NOW], "stream": True}).text
    blocks = [block.split("\n") for block in text.removesuffix("\n\n").split("\n\n")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name.removeprefix("event: ") for name, _ in blocks] == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    by_kind = {event["type"].removeprefix("response."): event for event in events}
    assert by_kind["function_call_arguments.done"]["output_index"] == 2
    assert by_kind["output_text.done"]["text"] == "Hi"
    added = [event["item"] for event in events if event["type"].endswith("item.added")]
    assert [item["status"] for item in added] == ["in_progress"] * 3 and added[0]["content"] == []
    done = [event["item"] for event in events if event["type"].endswith("item.done")]
    assert done == by_kind["completed"]["response"]["output"]
    for item in done:
        mine = [event for event in events if event.get("item_id") == item["id"]]
        assert mine and len({event["output_index"] for event in mine}) == 1


@every_form
def test_a_whole_round(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says(f"<think>Hm.</think>I look.{OSLO}{TIME}", "It is 7 degrees."))
    items: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    first = respond(server, stream, input=items, tools=[WEATHER, NOW])
    items += first.output
    for call in first.output[2:]:
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": f"{call.name}!"})
    assert respond(server, stream, input=items, tools=[WEATHER, NOW]).output_text == "It is 7 degrees."
    weather = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    now = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert prompt_of(server.engine.submitted()[-1]).endswith(
        f"[user]hi\n[assistant]<think>Hm.</think>I look.{weather}{now}\n[tool]get_weather!\n[tool]now!\n[assistant]"
    )


def test_input_items_become_messages(server: RunningServer) -> None:
    items = [
        {"type": "message", "role": "developer", "content": "d"},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}], "id": "msg_1"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "e"},
    ]
    respond(server, False, input=items, instructions="i", max_output_tokens=1)
    prompt = prompt_of(server.engine.submitted()[-1])
    assert prompt == "[system]i\n[system]d\n[user]a\nb\n[assistant]c\n[assistant]no\n[user]e\n[assistant]"


def _structured(server: RunningServer, **fields: Any) -> Any:
    respond(server, False, max_output_tokens=1, **fields)
    return server.engine.submitted()[-1].sampling.structured


def test_what_is_asked_is_enforced_by_grammar(start_chat_server, server: RunningServer) -> None:
    tools = start_chat_server(says(OSLO))
    for fields in (
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "name": "now"}},
        {"tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}},
        {"tools": [{**WEATHER, "strict": True}]},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}}},
    ):
        structured = _structured(tools, **{"tools": [WEATHER, NOW], **fields})
        assert structured.kind == "lark" and not LLMatcher.validate_grammar(structured.source)
    assert _structured(tools, tools=[WEATHER]) is None
    schema = {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS}}
    structured = _structured(server, text=schema)
    assert (structured.kind, json.loads(structured.source)) == ("json_schema", PARAMETERS)
    assert _structured(server, text={"format": {"type": "json_object"}}).kind == "json_schema"
    assert _structured(server, text={"format": {"type": "text"}}) is None


def test_what_the_engine_is_told(server: RunningServer) -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "max_output_tokens": 3, "user": "u"}
    respond(server, False, extra_body={"top_k": 4, "seed": 7, "min_p": 0.1, "cache_salt": "s", "priority": 2}, **fields)
    submit = server.engine.submitted()[-1]
    sampling = submit.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 4, 0.1)
    assert (submit.seed, submit.cache_salt, submit.priority) == (7, "s", 2)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_tool_calls": 3}, "max_tool_calls"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"messages": []}, "messages"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": 5}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"role": "user", "content": "x", "odd": 1}]}, "input"),
        ({"input": [{"role": "narrator", "content": "x"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "c"}]}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10**6}, "max_output_tokens"),
        ({"input": "x" * 3000}, "input"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}, "text"),
        ({"tools": [{**WEATHER, "strict": True, "parameters": {"properties": {"a": {"type": "x"}}}}]}, "tools"),
        ({"text": {"verbosity": "low"}}, "text"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning"),
        ({"temperature": -1}, "temperature"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ],
)
def test_what_is_refused_by_name(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    reply = server.post("/v1/responses", {"input": "hi", **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert param in error["message"]


def test_an_error_on_the_way_is_an_event(start_server) -> None:
    server = start_server(Behaviour(error_at_token=2, step_s=0.1))
    text = server.post("/v1/responses", {"input": "hi", "stream": True}).text
    name, data = text.removesuffix("\n\n").split("\n\n")[-1].split("\n")
    error = json.loads(data.removeprefix("data: "))
    assert name == "event: error" and error["code"] == "sample_failed" and error["sequence_number"] > 2
    with pytest.raises(openai.InternalServerError):
        respond(server, False)
