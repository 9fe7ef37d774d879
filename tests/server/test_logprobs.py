"""Logprobs, echo and prompt_logprobs through the official client: both endpoints, whole and streamed."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from byte_tokenizer import EOS_ID
from fake_engine import Behaviour, logprob_of
from running_server import RunningServer
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel

from toka.messages import TokenLogprob
from toka.server.logprobs import scored_prompt, spelling
from toka.text.tokenizer import Tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def completion(server: RunningServer, stream: bool, n: int = 1, **fields: Any) -> list[dict[str, Any]]:
    """The choices as dicts; of a stream joined from its chunks."""
    reply = server.openai.completions.create(model="default", stream=stream, n=n, **fields)
    if not stream:
        return [choice.model_dump() for choice in reply.choices]
    joined: dict[int, dict[str, Any]] = {}
    for chunk in reply:
        for choice in chunk.choices:
            whole = joined.setdefault(choice.index, {"text": "", "logprobs": None, "index": choice.index})
            whole["text"] += choice.text
            whole["finish_reason"] = choice.finish_reason
            if choice.logprobs is not None:
                known = whole["logprobs"] or {}
                new = choice.logprobs.model_dump()
                whole["logprobs"] = {name: known.get(name, []) + values for name, values in new.items()}
    return [joined[index] for index in sorted(joined)]


def chat(server: RunningServer, stream: bool, content: str, **fields: Any) -> list[Any]:
    """The first choice's content logprobs."""
    messages = [{"role": "user", "content": content}]
    reply = server.openai.chat.completions.create(model="default", messages=messages, stream=stream, **fields)
    if not stream:
        assert reply.choices[0].logprobs is not None
        return reply.choices[0].logprobs.content or []
    return [entry for chunk in reply for c in chunk.choices if c.logprobs for entry in c.logprobs.content or []]


every_form = pytest.mark.parametrize("stream", [False, True])


@every_form
def test_of_a_completion(server: RunningServer, stream: bool) -> None:
    [choice] = completion(server, stream, prompt="aAb", max_tokens=4, logprobs=2)
    assert choice["text"] == "aAba"
    assert choice["logprobs"] == {
        "tokens": ["a", "A", "b", "a"],
        "token_logprobs": [logprob_of(token) for token in b"aAba"],
        "text_offset": [0, 1, 2, 3],
        "top_logprobs": [
            {"@": -0.125, "A": -0.25, "a": logprob_of(97)},
            {"@": -0.125, "A": -0.25},  # the token itself is among the likeliest
            {"@": -0.125, "A": -0.25, "b": logprob_of(98)},
            {"@": -0.125, "A": -0.25, "a": logprob_of(97)},
        ],
    }


@every_form
def test_zero_likeliest_tell_the_token_itself(server: RunningServer, stream: bool) -> None:
    [choice] = completion(server, stream, prompt="ab", max_tokens=2, logprobs=0)
    assert choice["logprobs"]["top_logprobs"] == [{"a": logprob_of(97)}, {"b": logprob_of(98)}]


def test_without_asking_there_are_none(server: RunningServer) -> None:
    for stream in (False, True):
        assert completion(server, stream, prompt="ab", max_tokens=2)[0]["logprobs"] is None
    sampling = server.engine.submitted()[-1].sampling
    assert (sampling.logprobs, sampling.prompt_logprobs) == (None, None)


@every_form
def test_of_a_chat(server: RunningServer, stream: bool) -> None:
    first, *_ = chat(server, stream, "x", max_tokens=3, logprobs=True, top_logprobs=2)
    assert (first.token, first.logprob, first.bytes) == ("[", logprob_of(ord("[")), [ord("[")])
    assert [(top.token, top.logprob, top.bytes) for top in first.top_logprobs] == [
        ("@", -0.125, [64]),
        ("A", -0.25, [65]),
    ]
    assert len(chat(server, stream, "x", max_tokens=3, logprobs=True)) == 3
    assert all(entry.top_logprobs == [] for entry in chat(server, stream, "x", max_tokens=3, logprobs=True))


@every_form
def test_parts_of_a_character_are_told_by_their_bytes(server: RunningServer, stream: bool) -> None:
    [choice] = completion(server, stream, prompt="é!", max_tokens=3, logprobs=0)
    assert choice["text"] == "é!"
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1]
    entries = chat(server, stream, "é", max_tokens=8, logprobs=True)
    assert b"".join(bytes(entry.bytes) for entry in entries) == "[user]é".encode()


@every_form
def test_an_end_token_has_its_logprob_though_it_is_not_shown(server: RunningServer, stream: bool) -> None:
    [choice] = completion(server, stream, prompt=[97, EOS_ID], max_tokens=9, logprobs=1)
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "<eos>"]
    assert choice["logprobs"]["text_offset"] == [0, 1]


@every_form
@pytest.mark.parametrize(
    ("prompt", "stop", "tokens"),
    [
        ("Hello. Q: x", ["Q:"], list("Hello. ")),
        ("abQab", ["Q1", "Qa"], list("ab")),
        ("abQab", ["Qx"], list("abQaba")),  # held back for a while, and then it comes
        ("abQ", ["Qxy", "zz"], list("abQabQ")),
        ("aé1", ["é"], ["a"]),
    ],
)
def test_tokens_cut_off_by_a_stop_string_do_not_appear(
    server: RunningServer, prompt: str, stop: list[str], tokens: list[str], stream: bool
) -> None:
    [choice] = completion(server, stream, prompt=prompt, max_tokens=max(len(tokens), 6), stop=stop, logprobs=0)
    assert choice["text"] == "".join(tokens)
    assert choice["logprobs"]["tokens"] == tokens
    assert choice["logprobs"]["text_offset"] == list(range(len(tokens)))


@every_form
def test_echo_tells_the_prompt_first(server: RunningServer, stream: bool) -> None:
    [choice] = completion(server, stream, prompt="aé", max_tokens=2, logprobs=1, echo=True)
    assert choice["text"] == "aéa\ufffd"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "a", "bytes:\\xc3"]
    assert logprobs["token_logprobs"] == [None, *(logprob_of(token) for token in (0xC3, 0xA9, 97, 0xC3))]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {"@": -0.125, "bytes:\\xc3": logprob_of(0xC3)}


@every_form
def test_echo_without_logprobs_computes_none(server: RunningServer, stream: bool) -> None:
    choices = completion(server, stream, n=2, prompt=[[97, 98], [120, 121]], max_tokens=1, echo=True)
    assert [choice["text"] for choice in choices] == ["aba", "abb", "xyx", "xyy"]
    assert server.engine.submitted()[-1].sampling.prompt_logprobs is None


@every_form
@pytest.mark.parametrize("logprobs", [None, 1])
def test_only_the_prompt(server: RunningServer, stream: bool, logprobs: int | None) -> None:
    fields: dict[str, Any] = {} if logprobs is None else {"logprobs": logprobs}
    [choice] = completion(server, stream, prompt="abc", max_tokens=0, echo=True, **fields)
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert logprobs is None or choice["logprobs"]["tokens"] == list("abc")


@every_form
def test_samples_wait_for_the_prompt_that_the_first_one_scores(start_server: Any, stream: bool) -> None:
    """The others' tokens come long before the prompt is scored; in every choice it still stands first."""
    server = start_server(Behaviour(prompt_scores_per_step=2, step_s=0.01))
    choices = completion(server, stream, n=3, prompt=["abcdefghi", "xy"], max_tokens=3, logprobs=0, echo=True)
    assert [choice["text"] for choice in choices] == [
        "abcdefghiabc", "abcdefghibcd", "abcdefghicde", "xyxyx", "xyyxy", "xyxyx",
    ]  # fmt: skip
    for choice in choices:
        assert choice["logprobs"]["tokens"] == list(choice["text"])
        assert choice["logprobs"]["token_logprobs"] == [None, *(logprob_of(ord(c)) for c in choice["text"][1:])]


def test_what_lm_eval_asks_for(server: RunningServer) -> None:
    """Token prompts of several lengths, the prompt echoed: arrays of prompt length and one generated token, an end token included."""
    prompts = [[97, 98, 99], [100], [65, EOS_ID], [64, 65, 66, 67, 68]]
    fields = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    reply = server.post(COMPLETIONS, {"model": "default", **fields}).json()
    for choice, prompt in zip(reply["choices"], prompts, strict=True):
        logprobs = choice["logprobs"]
        assert all(len(values) == len(prompt) + 1 for values in logprobs.values())
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        for token, value, top in zip(
            prompt[1:], logprobs["token_logprobs"][1:-1], logprobs["top_logprobs"][1:-1], strict=True
        ):
            assert value == logprob_of(token)
            assert (value == max(top.values())) == (token % 64 == 0)  # whether it was the likeliest, by float equality


def test_prompt_logprobs_in_vllms_form(server: RunningServer) -> None:
    expected = [
        None,
        {
            "64": {"logprob": -0.125, "rank": 1, "decoded_token": "@"},
            "98": {"logprob": logprob_of(98), "rank": 35, "decoded_token": "b"},
        },
        {"64": {"logprob": -0.125, "rank": 1, "decoded_token": "@"}},
    ]
    body = {"prompt": [97, 98, 64], "max_tokens": 2, "prompt_logprobs": 1, "n": 2}
    choices = server.post(COMPLETIONS, body).json()["choices"]
    assert [choice["prompt_logprobs"] for choice in choices] == [expected, expected]
    assert all(choice["logprobs"] is None for choice in choices)
    messages = [{"role": "user", "content": "x"}]
    reply = server.post(CHAT, {"messages": messages, "max_tokens": 1, "prompt_logprobs": 0}).json()
    assert reply["prompt_logprobs"][0] is None
    assert reply["prompt_logprobs"][1] == {"117": {"logprob": logprob_of(117), "rank": 54, "decoded_token": "u"}}
    assert "prompt_logprobs" not in server.post(CHAT, {"messages": messages, "max_tokens": 1}).json()


def test_echo_and_prompt_logprobs_may_ask_for_different_numbers(server: RunningServer) -> None:
    body = {"prompt": "ab", "max_tokens": 0, "prompt_logprobs": 3, "logprobs": 1, "echo": True}
    [choice] = server.post(COMPLETIONS, body).json()["choices"]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 2 and len(choice["prompt_logprobs"][1]) == 4
    assert server.engine.submitted()[-1].sampling.prompt_logprobs == 3


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (COMPLETIONS, {"logprobs": 21}, "logprobs"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs"),
        (COMPLETIONS, {"logprobs": True}, "logprobs"),
        (COMPLETIONS, {"logprobs": 21, "echo": True}, "logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (COMPLETIONS, {"echo": 1}, "echo"),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": -1, "echo": True}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        (COMPLETIONS, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_is_refused_by_name(server: RunningServer, path: str, fields: dict[str, Any], param: str) -> None:
    prompt = {"prompt": "ab"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "x"}]}
    reply = server.post(path, {**prompt, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param) and param in error["message"]


def test_offsets_where_the_tokenizer_puts_a_space_before_every_text() -> None:
    backend = Backend(WordLevel({"▁ab": 0, "c": 1, "▁d": 2, "?": 3}, unk_token="?"))
    backend.decoder = Metaspace()
    tokenizer = Tokenizer(backend, special_tokens={})
    text = tokenizer.decode([0, 1, 2])
    tokens = scored_prompt(tokenizer, [0, 1, 2], text, [TokenLogprob(token, -1.0, 1, []) for token in (1, 2)])
    assert text == "abc d"
    assert [token.offset for token in tokens] == [0, 2, 3]
    assert [spelling(tokenizer, token.token_id) for token in tokens] == [" ab", "c", " d"]


def test_openapi_tells_the_fields(server: RunningServer) -> None:
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["CompletionRequest"]["properties"]["logprobs"]["type"] == "integer"
    assert schemas["ChatCompletionRequest"]["properties"]["logprobs"]["type"] == "boolean"
    assert {"CompletionLogprobs", "ChatLogprobs", "PromptTokenLogprob"} <= schemas.keys()


def test_a_broken_client_is_told(server: RunningServer) -> None:
    with pytest.raises(openai.BadRequestError, match="logprobs must be between 0 and 20, got 99"):
        server.openai.completions.create(model="default", prompt="x", logprobs=99)
