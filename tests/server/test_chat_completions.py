"""/v1/chat/completions through the official client."""

from __future__ import annotations

import json

import pytest
from byte_tokenizer import EOS_ID
from running_server import RunningServer
from scripted_chat import prompt_of, says

HI = [{"role": "user", "content": "hi"}]
PROMPT = "[user]hi\n[assistant]"


def test_the_template_makes_the_prompt(server: RunningServer) -> None:
    reply = server.openai.chat.completions.create(model="default", messages=HI, max_tokens=len(PROMPT))
    assert reply.choices[0].message.content == PROMPT
    assert reply.choices[0].message.role == "assistant"
    assert (reply.object, reply.choices[0].finish_reason) == ("chat.completion", "length")
    assert reply.usage.prompt_tokens == len(PROMPT)
    assert reply.system_fingerprint == f"fp_tiny-bytes_float32_toka-{server.get('/version').json()['version']}"


def test_a_stream_announces_the_role_and_then_has_one_chunk_per_token(server: RunningServer) -> None:
    chunks = list(
        server.openai.chat.completions.create(
            model="default", messages=HI, max_tokens=4, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    opening, tokens, usage = chunks[:2], chunks[2:-1], chunks[-1]
    assert [(c.choices[0].index, c.choices[0].delta.role, c.choices[0].delta.content) for c in opening] == [
        (0, "assistant", ""),
        (1, "assistant", ""),
    ]
    for sample, text in enumerate(("[use", "user")):
        mine = [chunk.choices[0] for chunk in tokens if chunk.choices[0].index == sample]
        assert "".join(choice.delta.content for choice in mine) == text
        assert [choice.finish_reason for choice in mine] == [None, None, None, "length"]
    assert (usage.choices, usage.usage.completion_tokens) == ([], 8)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_without_max_tokens_the_context_is_the_limit(server: RunningServer) -> None:
    reply = server.openai.chat.completions.create(model="default", messages=HI, stop="]hi\n[assistant][user]")
    assert server.engine.submitted()[-1].sampling.max_tokens == 2000 - len(PROMPT)
    assert reply.choices[0].finish_reason == "stop"


def test_both_names_of_max_tokens(server: RunningServer) -> None:
    client = server.openai.chat.completions
    assert client.create(model="default", messages=HI, max_completion_tokens=3).usage.completion_tokens == 3
    assert client.create(model="default", messages=HI, max_completion_tokens=3, max_tokens=3).usage.total_tokens
    reply = server.post("/v1/chat/completions", {"messages": HI, "max_tokens": 3, "max_completion_tokens": 4})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "max_tokens")


def test_content_parts_and_template_variables(server: RunningServer) -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    body = {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": 9,
        "add_generation_prompt": False,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == "[user]h\ni"


@pytest.mark.parametrize("stop", ["user", ["zzz", "user"]])
def test_a_streamed_stop_string_is_never_leaked(server: RunningServer, stop: object) -> None:
    stream = server.openai.chat.completions.create(model="default", messages=HI, stop=stop, max_tokens=90, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.delta.content for choice in choices) == "["
    assert choices[-1].finish_reason == "stop"


def test_a_model_without_a_template_says_so(start_server, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    reply = start_server().post("/v1/chat/completions", {"messages": HI})
    assert reply.status_code == 400
    assert "no chat template" in reply.json()["error"]["message"]


PREFILL = [*HI, {"role": "assistant", "content": " Sure: "}]


def _prompt(server: RunningServer, **fields: object) -> str:
    reply = server.post("/v1/chat/completions", {"messages": PREFILL, "max_tokens": 1, **fields})
    assert reply.status_code == 200, reply.text
    return prompt_of(server.engine.submitted()[-1])


def test_the_last_message_can_be_continued(server: RunningServer, start_chat_server) -> None:
    assert _prompt(server, continue_final_message=True) == "[user]hi\n[assistant] Sure: "
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert (
        _prompt(server, messages=parts, continue_final_message=True, add_generation_prompt=False) == "[assistant]a\nb"
    )
    trimming = "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}"
    assert _prompt(start_chat_server(says("x"), template=trimming), continue_final_message=True) == "hi</s>Sure: "
    silent = start_chat_server(says("x"), template="{{ messages[0].content }}")
    for one, fields in (
        (server, {"messages": HI}),
        (server, {"add_generation_prompt": True}),
        (server, {"messages": [{"role": "assistant", "content": ""}]}),
        (silent, {}),
    ):
        body = {"messages": PREFILL, "continue_final_message": True, **fields}
        reply = one.post("/v1/chat/completions", body)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "continue_final_message")


def test_reasoning_goes_on_where_the_last_message_is_in_the_middle_of_it(start_chat_server) -> None:
    server = start_chat_server(says(" more</think>Hi"))
    for content, reasoning in (("<think>a", "more"), ("<think>a</think>b", None)):
        body = {"messages": [{"role": "assistant", "content": content}], "continue_final_message": True}
        message = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
        assert message.get("reasoning") == reasoning


def test_a_template_from_the_request_only_where_the_server_allows_it(server: RunningServer, start_server) -> None:
    template = {"chat_template": "<{{ messages[0].content }}{{ x }}>", "chat_template_kwargs": {"x": 1}}
    reply = server.post("/v1/chat/completions", {"messages": HI, **template})
    assert reply.json()["error"]["param"] == "chat_template" and "allow_request_chat_template" in reply.text
    open_server = start_server(allow_request_chat_template=True)
    assert _prompt(open_server, **template) == "<hi1>"
    chat = open_server.post("/tokenize", {"messages": HI, **template}).json()
    assert bytes(chat["tokens"]) == b"<hi1>"
    for bad in ("{% if %}", "{{ ''.__class__.__mro__ }}", "x" * 300_000):
        reply = open_server.post("/v1/chat/completions", {"messages": HI, "chat_template": bad})
        assert reply.status_code == 400


def test_tokenize_takes_all_that_shapes_a_prompt(start_chat_server) -> None:
    server = start_chat_server(says("x"))
    tools = [{"type": "function", "function": {"name": "now"}}]
    for fields in (
        {"tools": tools},
        {"continue_final_message": True},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ):
        body = {"messages": PREFILL, **fields}
        tokens = server.post("/tokenize", body).json()["tokens"]
        assert bytes(tokens).decode() == _prompt(server, **fields)


def test_a_prompt_that_is_too_long_can_lose_its_beginning(server: RunningServer) -> None:
    assert _prompt(server, messages=HI, truncate_prompt_tokens=3) == "nt]"
    assert _prompt(server, messages=HI, truncate_prompt_tokens=3000) == PROMPT
    long = [{"role": "user", "content": "x" * 5000}]
    assert len(_prompt(server, messages=long, truncate_prompt_tokens=-1, max_tokens=10)) == 2000 - 10
    completions = {"prompt": ["abcdef", "xy"], "max_tokens": 1, "truncate_prompt_tokens": 2, "echo": True}
    choices = server.post("/v1/completions", completions).json()["choices"]
    assert [choice["text"] for choice in choices] == ["efe", "xyx"]


def test_token_ids(server: RunningServer) -> None:
    prompt = list(PROMPT.encode())
    fields = {"max_tokens": 3, "n": 2, "return_token_ids": True}
    reply = server.post("/v1/chat/completions", {"messages": HI, **fields}).json()
    assert reply["prompt_token_ids"] == prompt
    assert [choice["token_ids"] for choice in reply["choices"]] == [prompt[:3], prompt[1:4]]
    reply = server.post("/v1/completions", {"prompt": [97, EOS_ID], "max_tokens": 3, "return_token_ids": True}).json()
    [choice] = reply["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([97, EOS_ID], [97, EOS_ID])
    assert "token_ids" not in server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}).text


def _chunks(server: RunningServer, path: str, **body: object) -> list[dict]:
    lines = server.post(path, {"stream": True, **body}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line[6:]) for line in lines[:-2]]


def test_token_ids_in_a_stream(server: RunningServer, start_chat_server) -> None:
    prompt = list(PROMPT.encode())
    chunks = _chunks(server, "/v1/chat/completions", messages=HI, max_tokens=3, return_token_ids=True)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == prompt
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks[1:]] == [[token] for token in prompt[:3]]
    chunks = _chunks(server, "/v1/completions", prompt=["ab", "c"], max_tokens=2, return_token_ids=True)
    first = [chunk["choices"][0] for chunk in chunks if "prompt_token_ids" in chunk["choices"][0]]
    assert [(choice["index"], choice["prompt_token_ids"]) for choice in first] == [(0, [97, 98]), (1, [99])]
    reply = "<think>a</think>b"
    read = start_chat_server(says(reply))
    chunks = _chunks(read, "/v1/chat/completions", messages=HI, return_token_ids=True)
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks[1:]] == [
        [token] for token in [*reply.encode(), EOS_ID]
    ]


def test_timings(server: RunningServer) -> None:
    for path, start in (("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "abc"})):
        body = {**start, "max_tokens": 3, "return_timings": True}
        last = _chunks(server, path, **body)[-1]
        assert last["choices"] == [] and "usage" not in last
        for timings in (server.post(path, body).json()["timings"], last["timings"]):
            assert 0 < timings["first_token_s"] <= timings["last_token_s"] <= timings["total_s"]


def test_the_usage_of_every_chunk(server: RunningServer) -> None:
    for path, start in (("/v1/chat/completions", {"messages": HI}), ("/v1/completions", {"prompt": "abc"})):
        options = {"continuous_usage_stats": True, "include_usage": True}
        chunks = _chunks(server, path, max_tokens=4, stream_options=options, **start)
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == counts[-2] == 4
        assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1


def test_labels_change_nothing(server: RunningServer) -> None:
    body = {"messages": HI, "max_tokens": 2, "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s"}
    assert server.post("/v1/chat/completions", body).json()["choices"][0]["message"]["content"] == "[u"
