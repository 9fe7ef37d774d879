"""/v1/completions through the official client: whole and streamed, n, stop, usage, every form of prompt."""

from __future__ import annotations

import asyncio
import math
import time

import openai
import pytest
from byte_tokenizer import EOS_ID
from fake_engine import Behaviour
from running_server import RunningServer

from toka.messages import FinishReason

ABC = [97, 98, 99]


def _stream_texts(stream: openai.Stream, n: int = 1) -> tuple[list[str], list[str | None]]:
    texts, reasons = [""] * n, [None] * n
    for chunk in stream:
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "a chunk after the last one"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    return texts, reasons


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abca"]),
        (["abc", "xy"], ["abca", "xyxy"]),
        (ABC, ["abca"]),
        ([ABC, [120]], ["abca", "xxxx"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_form_of_prompt(server: RunningServer, prompt: object, texts: list[str], stream: bool) -> None:
    reply = server.openai.completions.create(model="default", prompt=prompt, max_tokens=4, stream=stream)
    if stream:
        assert _stream_texts(reply, len(texts)) == (texts, ["length"] * len(texts))
    else:
        assert [choice.text for choice in reply.choices] == texts
        assert [choice.index for choice in reply.choices] == list(range(len(texts)))
        assert {choice.finish_reason for choice in reply.choices} == {"length"}


@pytest.mark.parametrize("stream", [False, True])
def test_n_samples_of_several_prompts_have_the_right_index(server: RunningServer, stream: bool) -> None:
    reply = server.openai.completions.create(model="default", prompt=["abc", "xyz"], max_tokens=3, n=2, stream=stream)
    texts = ["abc", "bca", "xyz", "yzx"]  # the fake engine begins sample i at token i
    if stream:
        assert _stream_texts(reply, 4)[0] == texts
    else:
        assert [(choice.index, choice.text) for choice in reply.choices] == list(enumerate(texts))


def test_usage_counts_a_prompt_once_whatever_n(server: RunningServer) -> None:
    usage = server.openai.completions.create(model="default", prompt=["abc", "xy"], max_tokens=4, n=3).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 24, 29)
    assert usage.prompt_tokens_details.cached_tokens == 6  # the fake engine claims 3 a prompt


def test_a_stream_has_one_chunk_per_token_and_then_the_usage(server: RunningServer) -> None:
    stream = server.openai.completions.create(
        model="default", prompt="é", max_tokens=5, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [chunk.choices[0].text for chunk in chunks[:-1]] == ["", "é", "", "é", "\ufffd"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 5
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_wire_format_of_a_stream(server: RunningServer) -> None:
    reply = server.post("/v1/completions", {"prompt": '"\n', "max_tokens": 2, "stream": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = reply.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert len(lines) == 4
    assert '"usage"' not in reply.text
    assert '"text":"\\""' in lines[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "stop", "text"),
    [("Hello. Question: x", "Question:", "Hello. "), ("abcabd", ["zz", "abd"], "abc"), ("aé1", "é", "a")],
)
def test_stop_strings_over_token_borders(
    server: RunningServer, prompt: str, stop: str | list[str], text: str, stream: bool
) -> None:
    reply = server.openai.completions.create(model="default", prompt=prompt, max_tokens=100, stop=stop, stream=stream)
    if stream:
        assert _stream_texts(reply) == ([text], ["stop"])
    else:
        assert (reply.choices[0].text, reply.choices[0].finish_reason) == (text, "stop")


def test_a_stop_string_ends_the_request_in_the_engine(server: RunningServer) -> None:
    server.openai.completions.create(model="default", prompt="ab-stop-here", max_tokens=1000, stop="stop")
    request_id = server.engine.submitted()[-1].request_id
    server.wait(lambda: request_id in server.engine.aborted())


def test_text_held_back_for_a_stop_string_comes_at_the_end(server: RunningServer) -> None:
    reply = server.openai.completions.create(model="default", prompt="abcd", max_tokens=3, stop="cdX")
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("abc", "length")


def test_min_tokens_lets_an_early_stop_string_pass(server: RunningServer) -> None:
    reply = server.openai.completions.create(
        model="default", prompt="a.b.c.", max_tokens=50, stop=".", extra_body={"min_tokens": 3}
    )
    assert reply.choices[0].text == "a.b"


def test_end_tokens_end_the_text_and_are_not_part_of_it(server: RunningServer) -> None:
    prompt = [*ABC, EOS_ID, 100]
    reply = server.openai.completions.create(model="default", prompt=prompt, max_tokens=20)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("abc", "stop")
    assert reply.usage.completion_tokens == 4
    ignoring = server.openai.completions.create(
        model="default", prompt=prompt, max_tokens=5, extra_body={"ignore_eos": True}
    )
    assert ignoring.choices[0].text == "abcd"


def test_stop_token_ids(server: RunningServer) -> None:
    reply = server.openai.completions.create(
        model="default", prompt="abc", max_tokens=20, extra_body={"stop_token_ids": [99]}
    )
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("ab", "stop")


def test_what_the_engine_is_told(server: RunningServer) -> None:
    server.openai.completions.create(
        model="tiny-bytes",
        prompt="abc",
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        user="somebody",
        extra_body={
            "top_k": 5,
            "min_p": 0.1,
            "cache_salt": "tenant",
            "priority": -3,
            "stop_token_ids": [1],
            "session_id": "chat 7",
            "deadline_s": 2.5,
        },
    )
    submit = server.engine.submitted()[-1]
    assert (submit.seed, submit.cache_salt, submit.priority) == (11, "tenant", -3)
    assert (submit.session_id, submit.deadline_s) == ("chat 7", 2.5)
    assert 0 <= time.perf_counter() - submit.arrival_s < 60  # the clock that both processes share
    assert submit.stop_token_ids == (1, EOS_ID)
    sampling = submit.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (
        7, 0.5, 0.9, 5, 0.1,
    )  # fmt: skip


def test_defaults_are_openais(server: RunningServer) -> None:
    reply = server.post("/v1/completions", {"prompt": "abc", "top_k": -1, "logprobs": None, "n": None})
    assert reply.json()["usage"]["completion_tokens"] == 16
    sampling = server.engine.submitted()[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.n) == (1.0, 1.0, 0, 1)


def test_seeds_differ_where_none_is_given(server: RunningServer) -> None:
    for _ in range(2):
        server.openai.completions.create(model="default", prompt="abc", max_tokens=1)
    first, second = server.engine.submitted()[-2:]
    assert first.seed != second.seed


def test_many_streams_at_once_keep_apart(server: RunningServer) -> None:
    async def one(client: openai.AsyncOpenAI, letter: str) -> str:
        stream = await client.completions.create(model="default", prompt=letter, max_tokens=50, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with server.async_openai as client:
            return await asyncio.gather(*(one(client, letter) for letter in "abcdefghijklmnopqrstuvwxyz"))

    assert asyncio.run(all_of_them()) == [letter * 50 for letter in "abcdefghijklmnopqrstuvwxyz"]


def test_a_sample_the_engine_gives_up_is_a_500(start_server) -> None:
    server = start_server(Behaviour(error_at_token=2, step_s=0.1))  # slow: the first token must be on its way before
    with pytest.raises(openai.InternalServerError, match="could not go on"):
        server.openai.completions.create(model="default", prompt="abc", max_tokens=9)
    with pytest.raises(openai.APIError, match="could not go on"):
        list(server.openai.completions.create(model="default", prompt="abc", max_tokens=9, stream=True))
    reply = server.post("/v1/completions", {"prompt": "abc", "max_tokens": 9, "stream": True})
    assert reply.text.endswith('"code":"sample_failed"}}\n\ndata: [DONE]\n\n')
    assert server.serving.engine.num_open == 0


def test_a_request_that_could_not_begin_in_time_is_a_503_that_says_so(start_server) -> None:
    server = start_server(Behaviour(error_at_token=0, error=FinishReason.EXPIRED))
    body = {"prompt": "abc", "max_tokens": 5, "deadline_s": 0.001}
    reply = server.post("/v1/completions", body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (503, "deadline_exceeded", "deadline_s")
    assert reply.headers["x-should-retry"] == "false" and "deadline_s" in error["message"]
    assert server.get("/health").status_code == 200


def test_without_a_deadline_there_is_none(start_server) -> None:
    server = start_server()
    assert server.post("/v1/completions", {"prompt": "abc", "max_tokens": 1, "deadline_s": None}).status_code == 200
    [submit] = server.engine.submitted()
    assert submit.deadline_s == math.inf


def test_what_the_engine_is_told_of_logits(server: RunningServer) -> None:
    server.openai.completions.create(
        model="default",
        prompt="abc",
        max_tokens=1,
        presence_penalty=0.5,
        frequency_penalty=-1,
        logit_bias={"97": -100, "98": 2.5},
        extra_body={"repetition_penalty": 1.25, "bad_words": ["no", " é"]},
    )
    sampling = server.engine.submitted()[-1].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -1.0, 1.25)
    assert sampling.logit_bias == ((97, -100.0), (98, 2.5))
    assert [bytes(word).decode() for word in sampling.bad_words] == ["no", " no", " é"]
    assert sampling.adjusts_logits
    server.openai.completions.create(model="default", prompt="abc", max_tokens=1, presence_penalty=0, logit_bias={})
    assert not server.engine.submitted()[-1].sampling.adjusts_logits


def test_the_best_of_several(server: RunningServer) -> None:
    """The fake engine begins sample i at token i of the prompt, and likes a token the better the smaller it is (from 64 on)."""
    fields = {"model": "default", "prompt": ["zAyB", "abc"], "max_tokens": 1, "best_of": 4}
    choices = server.openai.completions.create(**fields, n=2).choices
    assert [(choice.index, choice.text) for choice in choices] == [(0, "A"), (1, "B"), (2, "a"), (3, "a")]
    assert all(choice.logprobs is None for choice in choices)
    reply = server.openai.completions.create(**fields, logprobs=1)
    assert [choice.logprobs.tokens for choice in reply.choices] == [["A"], ["a"]]
    assert reply.usage.completion_tokens == 8
    for wrong in ({"best_of": 1, "n": 2}, {"best_of": 200}, {"best_of": 2, "stream": True}, {"best_of": "x"}):
        error = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, **wrong}).json()["error"]
        assert error["param"] == "best_of"
