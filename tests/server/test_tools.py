"""Tools and reasoning in chat completions, through the official client, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from llguidance import LLMatcher
from running_server import RunningServer
from scripted_chat import prompt_of, says

HI = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells it.", "parameters": PARAMETERS},
}
NOW = {"type": "function", "function": {"name": "now"}}
OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
every_form = pytest.mark.parametrize("stream", [False, True])


def chat(server: RunningServer, stream: bool, **fields: Any) -> Any:
    """The reply, in a stream as the client's own accumulator joins it."""
    fields = {"model": "default", "messages": HI, **fields}
    if not stream:
        return server.openai.chat.completions.create(**fields)
    with server.openai.chat.completions.stream(**fields) as events:
        return events.get_final_completion()


@every_form
def test_a_call_and_what_was_said_before(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says(f"Let me see.\n{OSLO}"))
    [choice] = chat(server, stream, tools=[WEATHER, NOW]).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
    [call] = choice.message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "get_weather",
        {"city": "Oslo"},
    )
    assert len(call.id) == 9 and call.id.isalnum()
    submit = server.engine.submitted()[-1]
    assert prompt_of(submit).startswith(
        '[tools][{"type": "function", "function": {"name": "get_weather", "description": "Tells it."'
    )
    assert submit.sampling.structured is None


@every_form
def test_several_calls_and_several_choices(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says(f"{OSLO}\n{TIME}"))
    reply = chat(server, stream, tools=[WEATHER, NOW], n=2)
    for choice in reply.choices:
        assert choice.message.content in (None, "")
        assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "now"]
        assert len({call.id for call in choice.message.tool_calls}) == 2


def test_the_deltas_of_a_stream(start_chat_server) -> None:
    server = start_chat_server(says(OSLO))
    body = {"messages": HI, "tools": [WEATHER], "stream": True, "stream_options": {"include_usage": True}}
    lines = server.post("/v1/chat/completions", body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line[6:]) for line in lines[:-2]]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert all(len(each) == 1 and each[0]["index"] == 0 for each in calls)
    first = calls[0][0]
    assert first == {
        "index": 0,
        "id": first["id"],
        "type": "function",
        "function": {"name": "get_weather", "arguments": ""},
    }
    assert all(each[0].keys() == {"index", "function"} for each in calls[1:])
    assert len(calls) > 5 and "".join(each[0]["function"]["arguments"] for each in calls) == '{"city": "Oslo"}'
    assert not any(delta.get("content") for delta in deltas)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert reasons[-1] == "tool_calls" and not any(reasons[:-1])
    assert chunks[-1]["usage"]["completion_tokens"] == len(OSLO) + 1


@every_form
def test_an_answer_without_a_call(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says("Sunny <3 today."))
    [choice] = chat(server, stream, tools=[WEATHER]).choices
    assert (choice.message.content, choice.finish_reason) == ("Sunny <3 today.", "stop")
    assert not choice.message.tool_calls


@every_form
def test_a_call_cut_off_by_max_tokens_has_that_reason(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says(OSLO))
    fields = {"messages": HI, "tools": [WEATHER], "max_tokens": len(OSLO) - 20}
    if stream:
        chunks = server.openai.chat.completions.create(model="default", stream=True, **fields)
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "length"
    else:
        [choice] = chat(server, stream, **fields).choices
        assert choice.finish_reason == "length"
        assert choice.message.tool_calls[0].function.arguments.startswith('{"city"')


def _grammar(server: RunningServer, **fields: Any) -> str:
    reply = server.post("/v1/chat/completions", {"messages": HI, "tools": [WEATHER, NOW], "max_tokens": 1, **fields})
    assert reply.status_code == 200, reply.text
    structured = server.engine.submitted()[-1].sampling.structured
    assert structured.kind == "lark" and not LLMatcher.validate_grammar(structured.source)
    return structured.source


def test_what_is_required_is_enforced_by_grammar(start_chat_server) -> None:
    server = start_chat_server(says(OSLO))
    both = _grammar(server, tool_choice="required")
    assert "get_weather" in both and "now" in both and "text" not in both.split("body:")[1]
    named = _grammar(server, tool_choice={"type": "function", "function": {"name": "now"}})
    assert "now" in named and "get_weather" not in named
    assert "get_weather" in prompt_of(server.engine.submitted()[-1])  # the model still sees all of them
    allowed = {"type": "function", "function": {"name": "now"}}
    some = _grammar(
        server, tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [allowed]}}
    )
    assert some.count("get_weather") == 0
    assert _grammar(server, parallel_tool_calls=False)
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    held = _grammar(server, tools=[strict, NOW])
    assert '"city"' in held and "strict" not in prompt_of(server.engine.submitted()[-1])


def test_no_tools_are_shown_where_none_may_be_called(start_chat_server) -> None:
    server = start_chat_server(says(OSLO))
    [choice] = chat(server, False, tools=[WEATHER], tool_choice="none").choices
    assert (choice.message.content, choice.message.tool_calls) == (OSLO, None)
    assert "[tools]" not in prompt_of(server.engine.submitted()[-1])


def test_a_whole_round_is_rendered(start_chat_server) -> None:
    server = start_chat_server(says(OSLO, "It is 7 degrees."))
    messages: list[Any] = list(HI)
    message = chat(server, False, tools=[WEATHER]).choices[0].message
    messages += [message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "7 degrees"}]
    assert chat(server, False, messages=messages, tools=[WEATHER]).choices[0].message.content == "It is 7 degrees."
    prompt = prompt_of(server.engine.submitted()[-1])
    call = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'  # arguments as an object, which templates expect
    assert prompt.endswith(f"[user]hi\n[assistant]<tool_call>{call}</tool_call>\n[tool]7 degrees\n[assistant]")


def test_models_whose_template_knows_no_tools_are_told_of_them_in_text(start_chat_server) -> None:
    plain = "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}[assistant]"
    server = start_chat_server(says(f"{OSLO}{TIME}", "Fine."), template=plain)
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *HI]
    message = chat(server, False, messages=messages, tools=[WEATHER, NOW]).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "now"]
    prompt = prompt_of(server.engine.submitted()[-1])
    assert prompt.startswith("[system]Be brief.\n\nYou can call these functions") and '"name": "now"' in prompt
    results = [{"role": "tool", "tool_call_id": call.id, "content": call.function.name} for call in message.tool_calls]
    chat(server, False, messages=[*messages, message, *results], tools=[WEATHER, NOW])
    prompt = prompt_of(server.engine.submitted()[-1])
    assert (
        f"[assistant]{OSLO}\n{TIME}\n[user]<tool_response>\nget_weather\n</tool_response>\n<tool_response>\nnow"
        in prompt
    )


def test_other_styles_and_their_special_tokens(start_chat_server) -> None:
    mistral = "{{ tools | tojson }}{{ '[TOOL_CALLS]' }}{% for m in messages %}{{ m.content }}{% endfor %}"
    marks = ["[TOOL_CALLS]"]
    reply = '[TOOL_CALLS][{"name": "now", "arguments": {}}]'
    server = start_chat_server(says(reply, marks=marks), template=mistral, marks=marks)
    for stream in (False, True):
        [choice] = chat(server, stream, tools=[NOW]).choices
        assert [call.function.name for call in choice.message.tool_calls] == ["now"]
    unknown = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    by_hand = start_chat_server(says("[now()]"), template=unknown, tool_call_parser="pythonic")
    assert chat(by_hand, True, tools=[NOW]).choices[0].message.tool_calls[0].function.arguments == "{}"
    unsure = start_chat_server(says("x"), template=unknown)
    with pytest.raises(openai.BadRequestError, match="tool_call_parser"):
        chat(unsure, False, tools=[NOW])


RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "[assistant]",
    "fields": {
        "thinking": {"open": "<|reason|>", "close": "<|/reason|>"},
        "tool_calls": {
            "open_pattern": r"<\|call\|>(?P<name>\w+)",
            "close": "<|/call|>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {},
    },
}


@every_form
def test_a_response_template_reads_replies_of_any_form(start_chat_server, stream: bool) -> None:
    marks = ["<|reason|>", "<|/reason|>", "<|call|>", "<|/call|>"]
    reply = '<|reason|> Hm. <|/reason|>\n I look. <|call|>get_weather{"city": "Oslo"}<|/call|><|call|>now{}<|/call|>'
    server = start_chat_server(
        says(reply, "<|call|>now{broken<|/call|> and on", marks=marks),
        marks=marks,
        settings={"response_template": RESPONSE_TEMPLATE},
    )
    completion = chat(server, stream, tools=[WEATHER, NOW])
    message = completion.choices[0].message
    assert (message.content, message.reasoning) == ("I look.", "Hm.")
    assert [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls] == [
        ("get_weather", {"city": "Oslo"}),
        ("now", {}),
    ]
    if not stream:
        assert completion.usage.completion_tokens_details.reasoning_tokens == len(" Hm. ") + 2
    broken = chat(server, stream, tools=[NOW]).choices[0].message
    assert not broken.tool_calls and "{broken" in broken.content and broken.content.endswith(" and on")


@every_form
@pytest.mark.parametrize("begun", [True, False])
def test_reasoning(start_chat_server, stream: bool, begun: bool) -> None:
    thought = "Well, \n<b> hm"
    server = start_chat_server(says(("" if begun else "<think>\n") + f"{thought}\n</think>\n\nHello."))
    fields: dict[str, Any] = {"extra_body": {"chat_template_kwargs": {"enable_thinking": begun}}}
    message = chat(server, stream, **fields).choices[0].message
    assert (message.reasoning, message.reasoning_content, message.content) == (thought, thought, "Hello.")


def test_reasoning_tokens_are_counted(start_chat_server) -> None:
    server = start_chat_server(says("<think>abc</think>Hello."))
    usage = chat(server, False, n=2).usage
    assert usage.completion_tokens_details.reasoning_tokens == 2 * len("<think>abc</think>") - 2 * len("<think")
    stream = server.openai.chat.completions.create(
        model="default", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    assert list(stream)[-1].usage.completion_tokens_details.reasoning_tokens == len("abc</think>") + 1


def test_an_earlier_replys_reasoning_goes_back_to_the_template(start_chat_server) -> None:
    server = start_chat_server(says("ok"))
    for name in ("reasoning", "reasoning_content"):
        chat(server, False, messages=[{"role": "assistant", "content": "b", name: "a"}])
        assert "[assistant]<think>a</think>b\n" in prompt_of(server.engine.submitted()[-1])


def test_a_budget_ends_the_reasoning_by_grammar(start_chat_server) -> None:
    marks = ["<think>", "</think>"]
    server = start_chat_server(says("hm</think>Hi", marks=marks), marks=marks)
    for name in ("reasoning_budget", "thinking_token_budget"):
        chat(server, False, extra_body={name: 7, "chat_template_kwargs": {"enable_thinking": True}})
        structured = server.engine.submitted()[-1].sampling.structured
        assert "[max_tokens=7]" in structured.source and not LLMatcher.validate_grammar(structured.source)
    reply = server.post("/v1/chat/completions", {"messages": HI, "reasoning_budget": 7, "thinking_token_budget": 8})
    assert "contradict" in reply.json()["error"]["message"]


def test_effort_is_told_the_template_in_its_own_words(start_chat_server) -> None:
    server = start_chat_server(says("x"))
    for effort, begun in (("none", False), ("high", True)):
        chat(server, False, reasoning_effort=effort)
        assert prompt_of(server.engine.submitted()[-1]).endswith("<think>\n") is begun
    template = "{{ reasoning_effort }}{{ messages[0].content }}"
    chat(start := start_chat_server(says("x"), template=template), False, reasoning_effort="low")
    assert prompt_of(start.engine.submitted()[-1]) == "lowhi"


@every_form
def test_logprobs_of_a_reply_in_parts(start_chat_server, stream: bool) -> None:
    server = start_chat_server(says(f"<think>a</think>b{TIME}"))
    fields = {"messages": HI, "tools": [NOW], "logprobs": True}
    reply = server.openai.chat.completions.create(model="default", stream=stream, **fields)
    chunks = list(reply) if stream else [reply]
    entries = [e for chunk in chunks for c in chunk.choices if c.logprobs for e in c.logprobs.content or []]
    assert "".join(entry.token for entry in entries) == f"<think>a</think>b{TIME}<eos>"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "x"}}]}, "tools"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [WEATHER] * 129}, "tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": []}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": []}}}, "tool_choice"),
    ],
)
def test_what_is_refused(start_chat_server, fields: dict[str, Any], param: str) -> None:
    reply = start_chat_server(says("x")).post("/v1/chat/completions", {"messages": HI, "tools": [WEATHER], **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_deeply_nested_schemas_are_refused(start_chat_server) -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(200):
        schema = {"type": "object", "properties": {"a": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    reply = start_chat_server(says("x")).post("/v1/chat/completions", {"messages": HI, "tools": [tool]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")
