"""What is refused, how it is named, and that nothing hostile gets further than a 400."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from fake_engine import Behaviour
from running_server import RunningServer

from toka.messages import Rejected
from toka.server.schemas import NEUTRAL_VALUES, ChatCompletionRequest, CompletionRequest

HI = [{"role": "user", "content": "hi"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def _error(reply: httpx.Response, status: int = 400) -> dict:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 400
    assert reply.headers["x-request-id"]
    return error


def _post(server: RunningServer, path: str, **fields: object) -> httpx.Response:
    start = {"prompt": "abc"} if path == COMPLETIONS else {"messages": HI}
    return server.post(path, {**start, "max_tokens": 2, **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suffix", "x"), ("allowed_token_ids", [1]), ("guided_json", {}), ("reasoning_budget", 5),
        ("include_stop_str_in_output", True), ("skip_special_tokens", False), ("use_beam_search", True),
        ("never_heard_of", 1), ("never_heard_of", None), ("tools", []),
    ],
)  # fmt: skip
def test_completion_fields_that_are_refused_by_name(server: RunningServer, field: str, value: object) -> None:
    error = _error(_post(server, COMPLETIONS, **{field: value}))
    assert error["param"] == field
    assert field in error["message"]
    assert "not supported" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]), ("tool_choice", "required"),
        ("functions", [{}]), ("reasoning_effort", "low"),
        ("modalities", ["audio"]), ("continue_final_message", True), ("chat_template", "x"), ("store", True),
        ("prompt", "x"), ("web_search_options", {}), ("reasoning_budget", 5),
        ("reasoning_effort", "huge"), ("reasoning_effort", "none"), ("tool_choice", "any"), ("tools", {}),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("tool_choice", {"type": "custom"}),
        ("parallel_tool_calls", 1),
    ],
)  # fmt: skip
def test_chat_fields_that_are_refused_by_name(server: RunningServer, field: str, value: object) -> None:
    assert _error(_post(server, CHAT, **{field: value}))["param"] == field


@pytest.mark.parametrize(("path", "schema"), [(COMPLETIONS, CompletionRequest), (CHAT, ChatCompletionRequest)])
def test_values_that_change_nothing_are_accepted(server: RunningServer, path: str, schema: type) -> None:
    for name, values in NEUTRAL_VALUES[schema].items():
        for value in (*values, None):
            assert _post(server, path, **{name: value}).status_code == 200, (name, value)
    assert _post(server, path, best_of=2, n=2).status_code == 200 if path == COMPLETIONS else True
    assert _post(server, path, presence_penalty=0.0, frequency_penalty=0.0, user="u", seed=None).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": "5"}, "max_tokens"), ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"), ({"n": 0}, "n"), ({"n": 1000}, "n"), ({"n": -1}, "n"),
        ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"temperature": 1e9}, "temperature"),
        ({"top_p": 0}, "top_p"), ({"top_p": 2}, "top_p"), ({"top_k": -2}, "top_k"), ({"min_p": 3}, "min_p"),
        ({"seed": 2**64}, "seed"), ({"seed": 10**40}, "seed"), ({"seed": "x"}, "seed"),
        ({"stop": 5}, "stop"), ({"stop": [5]}, "stop"), ({"stop": ""}, "stop"), ({"stop": ["x"] * 99}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"), ({"stop_token_ids": [258]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(16))}, "stop_token_ids"), ({"stop_token_ids": "x"}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"), ({"min_tokens": 5}, "min_tokens"), ({"priority": 2**40}, "priority"),
        ({"stream": "yes"}, "stream"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options"), ({"model": 5}, "model"),
        ({"ignore_eos": 1}, "ignore_eos"), ({"cache_salt": 1}, "cache_salt"),
        ({"session_id": 1}, "session_id"), ({"session_id": "x" * 300}, "session_id"), ({"session_id": ["x"]}, "session_id"),
        ({"deadline_s": 0}, "deadline_s"), ({"deadline_s": -1}, "deadline_s"), ({"deadline_s": 1e9}, "deadline_s"),
        ({"presence_penalty": 2.1}, "presence_penalty"), ({"presence_penalty": "x"}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"), ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"), ({"logit_bias": {"258": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1, "05": 1}}, "logit_bias"), ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"bad_words": [""]}, "bad_words"), ({"bad_words": ["much too long"]}, "bad_words"), ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": ["x"] * 65}, "bad_words"), ({"bad_words": [str(i) for i in range(40)]}, "bad_words"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"), ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"metadata": {"a": 1}}, "metadata"), ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"return_token_ids": 1}, "return_token_ids"), ({"return_timings": "x"}, "return_timings"),
        ({"deadline_s": "soon"}, "deadline_s"), ({"priority": 1.5}, "priority"), ({"priority": "high"}, "priority"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_wrong_values_name_their_field(server: RunningServer, path: str, fields: dict, param: str) -> None:
    assert _error(_post(server, path, **fields))["param"] == param


@pytest.mark.parametrize(
    "prompt",
    [[], "", [[]], [[97], []], [97, "a"], [[97], "a"], [-1], [258], [[97], [999]], [2**40], [10**30], [1.5], [True],
     [None], {}, 5, [[["a"]]], [[97, True]]],
)  # fmt: skip
def test_prompts_that_are_none(server: RunningServer, prompt: object) -> None:
    assert _error(server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 1}))["param"] == "prompt"


@pytest.mark.parametrize(
    "messages",
    [[], "hi", [5], [{}], [{"role": "user", "content": 5}], [{"role": 5, "content": "x"}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     [{"role": "user", "content": "x", "weird": 1}],
     [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
     [{"role": "user", "content": "x", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}],
     [{"role": "tool", "tool_call_id": "1"}], [{"role": "user"}],
     [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}]],
)  # fmt: skip
def test_messages_that_are_none(server: RunningServer, messages: object) -> None:
    assert _error(server.post(CHAT, {"messages": messages, "max_tokens": 1}))["param"] == "messages"


def test_required_fields(server: RunningServer) -> None:
    assert _error(server.post(COMPLETIONS, {"max_tokens": 1}))["message"] == "prompt: is required."
    assert _error(server.post(CHAT, {"model": "default"}))["param"] == "messages"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": NaN}', b'{"prompt": "a", "temperature": Infinity}',
     b'{"prompt": "\\ud800"}', b'{"prompt": "\xff\xfe"}', b"[" * 200_000, b'{"prompt":' * 100_000,
     b'{"prompt": "a", "temperature": 1e999}', b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", b"\x00" * 100,
     b'{"prompt": "a", "logit_bias": ' + b'{"a":' * 50_000],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize", "/detokenize"])
def test_hostile_bytes_are_a_400(server: RunningServer, path: str, body: bytes) -> None:
    error = _error(server.post(path, content=body, headers={"content-type": "application/json"}))
    assert error["type"] == "invalid_request_error"


def test_a_huge_body_is_413_and_a_huge_text_400(server: RunningServer) -> None:
    huge = b'{"prompt": "' + b"a" * (33 * 2**20) + b'"}'
    assert _error(server.post(COMPLETIONS, content=huge), 413)["code"] == "request_too_large"
    assert _error(server.post(COMPLETIONS, {"prompt": "a" * 10_000_000}))["param"] == "prompt"
    assert _error(server.post("/tokenize", {"prompt": "a" * 10_000_000}))["param"] == "prompt"
    assert server.get("/health").status_code == 200


def test_errors_echo_only_a_short_piece_of_the_input(server: RunningServer) -> None:
    _error(_post(server, COMPLETIONS, **{"x" * 10_000: 1}))
    _error(_post(server, COMPLETIONS, model="m" * 10_000), 404)
    _error(server.post(CHAT, {"messages": [{"role": "user", "content": "x", "y" * 10_000: 1}]}))


def test_prompt_and_output_beyond_the_limit_name_both_numbers(server: RunningServer) -> None:
    error = _error(_post(server, COMPLETIONS, prompt="a" * 1500, max_tokens=501))
    assert error["param"] == "max_tokens"
    assert "1500" in error["message"]
    assert "501" in error["message"]
    assert "2000" in error["message"]
    assert _post(server, COMPLETIONS, prompt="a" * 1500, max_tokens=500).status_code == 200
    assert _error(_post(server, COMPLETIONS, prompt="a" * 2000))["code"] == "context_length_exceeded"


def test_an_unknown_model_is_a_404(server: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as caught:
        server.openai.completions.create(model="gpt-5", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_unknown_routes_and_methods_have_the_same_form(server: RunningServer) -> None:
    assert _error(server.get("/v1/nothing"), 404)["type"] == "not_found_error"
    reply = server.get(COMPLETIONS)
    _error(reply, 405)
    assert reply.headers["allow"] == "POST"
    assert reply.headers["x-should-retry"] == "false"


def test_the_engines_refusal_reaches_the_client(start_server) -> None:
    def reject(submit):
        return Rejected(request_id=submit.request_id, message="could never fit", param="max_tokens", status=400)

    server = start_server(Behaviour(reject=reject))
    for stream in (False, True):
        error = _error(_post(server, COMPLETIONS, stream=stream, n=2))
        assert (error["message"], error["param"]) == ("could never fit", "max_tokens")
    assert server.serving.engine.num_open == 0


def test_a_full_server_says_429_and_when_to_come_back(start_server) -> None:
    server = start_server(Behaviour(step_s=0.02), max_queued_requests=3)
    with server.openai.completions.create(model="default", prompt="abc", max_tokens=1000, n=2, stream=True) as stream:
        next(iter(stream))
        reply = _post(server, COMPLETIONS, n=2)
        assert _error(reply, 429)["type"] == "rate_limit_error"
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.headers["x-should-retry"] == "true"
        assert _post(server, COMPLETIONS, n=1).status_code == 200
    assert _error(_post(server, COMPLETIONS, n=4))["param"] == "n"  # would never fit: no use in coming back


def test_what_goes_wrong_inside_is_a_500_that_tells_nothing(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("the secret")

    monkeypatch.setattr(server.serving, "submit", explode, raising=True)
    reply = _post(server, COMPLETIONS)
    assert _error(reply, 500)["type"] == "internal_server_error"
    assert "secret" not in reply.text
    assert json.loads(reply.text)
