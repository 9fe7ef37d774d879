"""/v1/chat/completions through the official client."""

from __future__ import annotations

import pytest
from running_server import RunningServer

HI = [{"role": "user", "content": "hi"}]
PROMPT = "[user]hi\n[assistant]"


def test_the_template_makes_the_prompt(server: RunningServer) -> None:
    reply = server.openai.chat.completions.create(model="default", messages=HI, max_tokens=len(PROMPT))
    assert reply.choices[0].message.content == PROMPT
    assert reply.choices[0].message.role == "assistant"
    assert (reply.object, reply.choices[0].finish_reason) == ("chat.completion", "length")
    assert reply.usage.prompt_tokens == len(PROMPT)
    assert reply.system_fingerprint.startswith("fp_")


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
