"""/v1/embeddings through the official client: every form of input, both encodings, dimensions, usage, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import openai
import pytest
from fake_engine import VOCAB_SIZE, Behaviour, vector_of
from running_server import RunningServer

from toka.config import Config
from toka.messages import FinishReason
from toka.pooling import Pooling
from toka.text.tokenizer import Tokenizer

WIDTH, MAX_TOKENS = 12, 40
POOLING = Pooling(task="embed", mode="mean", normalize=True, is_encoder=True, width=WIDTH)
ABC = [97, 98, 99]


@pytest.fixture(scope="module")
def embedder(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    behaviour = Behaviour(pooling=POOLING, max_request_tokens=MAX_TOKENS)
    with RunningServer(tokenizer, Config(), behaviour) as running:
        yield running


def expected(prompt: list[int], dimensions: int = WIDTH) -> np.ndarray:
    vector = vector_of(prompt, WIDTH)[:dimensions].astype(np.float64)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [("abc", [ABC]), (["abc", "xy", "abc"], [ABC, [120, 121], ABC]), (ABC, [ABC]), ([ABC, [7]], [ABC, [7]])],
)
@pytest.mark.parametrize("encoding_format", [None, "float", "base64"])
def test_every_form_of_input(
    embedder: RunningServer, given: object, prompts: list[list[int]], encoding_format: str | None
) -> None:
    """Left out, the client itself asks for base64 and decodes it."""
    chosen = {} if encoding_format is None else {"encoding_format": encoding_format}
    reply = embedder.openai.embeddings.create(model="default", input=given, **chosen)
    assert [entry.index for entry in reply.data] == list(range(len(prompts)))
    for entry, prompt in zip(reply.data, prompts, strict=True):
        numbers = entry.embedding
        if encoding_format == "base64":
            numbers = np.frombuffer(base64.b64decode(numbers), "<f4")
        np.testing.assert_allclose(numbers, expected(prompt), atol=1e-6)
    num_tokens = sum(map(len, prompts))
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (num_tokens, num_tokens)
    assert reply.model == "default" and reply.object == "list"


def test_dimensions_are_cut_before_the_vector_is_normalised(embedder: RunningServer) -> None:
    reply = embedder.openai.embeddings.create(model="default", input="abc", dimensions=5)
    np.testing.assert_allclose(reply.data[0].embedding, expected(ABC, 5), atol=1e-6)
    assert np.linalg.norm(reply.data[0].embedding) == pytest.approx(1)


def test_normalising_can_be_switched_off(embedder: RunningServer) -> None:
    reply = embedder.post("/v1/embeddings", {"input": ABC, "normalize": False}).json()
    np.testing.assert_array_equal(np.float32(reply["data"][0]["embedding"]), vector_of(ABC, WIDTH))


def test_a_model_that_is_not_normalised_is_so_on_request(start_server) -> None:
    pooling = Pooling(task="embed", mode="last", normalize=False, is_encoder=False, width=WIDTH)
    server = start_server(Behaviour(pooling=pooling))
    for asked, wanted in (({}, vector_of(ABC, WIDTH)), ({"normalize": True}, expected(ABC))):
        reply = server.post("/v1/embeddings", {"input": ABC, **asked}).json()
        np.testing.assert_allclose(reply["data"][0]["embedding"], wanted, atol=1e-6)


@pytest.mark.parametrize(("truncate", "kept"), [(-1, MAX_TOKENS), (3, 3), (MAX_TOKENS, MAX_TOKENS)])
@pytest.mark.parametrize("as_text", [True, False])
def test_too_long_inputs_are_cut_if_asked(embedder: RunningServer, truncate: int, kept: int, as_text: bool) -> None:
    prompt = [97 + i % 20 for i in range(MAX_TOKENS + 9)]
    given = bytes(prompt).decode() if as_text else prompt
    refused = embedder.post("/v1/embeddings", {"input": given})
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "context_length_exceeded"
    assert f"{MAX_TOKENS + 9} tokens; the model holds {MAX_TOKENS}" in refused.json()["error"]["message"]
    reply = embedder.post("/v1/embeddings", {"input": given, "truncate_prompt_tokens": truncate}).json()
    np.testing.assert_allclose(reply["data"][0]["embedding"], expected(prompt[:kept]), atol=1e-6)
    assert reply["usage"] == {"prompt_tokens": kept, "total_tokens": kept}
    bare = {"input": given, "truncate_prompt_tokens": truncate, "add_special_tokens": False}
    assert embedder.post("/v1/embeddings", bare).json()["usage"]["prompt_tokens"] == kept


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": ""}, "input", "at least one token"),
        ({"input": []}, "input", "must not be empty"),
        ({"input": ["a", 3]}, "input", "must not mix"),
        ({"input": [[1], []]}, "input", "at least one token"),
        ({"input": [VOCAB_SIZE]}, "input", f"outside 0..{VOCAB_SIZE - 1}"),
        ({"input": "a", "dimensions": 0}, "dimensions", "between 1 and 12, got 0"),
        ({"input": "a", "dimensions": 13}, "dimensions", "between 1 and 12, got 13"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "int8"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "-1 or between 1 and 40, got 0"),
        ({"input": "a", "truncate_prompt_tokens": 41}, "truncate_prompt_tokens", "-1 or between 1 and 40, got 41"),
        ({"input": "a", "input_type": "query"}, "input_type", "not supported"),
        ({"input": "a", "priority": 2**40}, "priority", "between"),
        ({}, "input", "is required"),
    ],
)
def test_what_is_wrong_is_refused_by_name(embedder: RunningServer, body: object, param: str, words: str) -> None:
    reply = embedder.post("/v1/embeddings", body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param and words in reply.json()["error"]["message"]


def test_an_unknown_model_is_a_404(embedder: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError):
        embedder.openai.embeddings.create(model="ada", input="a")


def test_a_server_that_embeds_generates_nothing_and_the_other_way_round(
    embedder: RunningServer, server: RunningServer
) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        reply = embedder.post(path, body)
        assert reply.status_code == 400 and "/v1/embeddings" in reply.json()["error"]["message"]
    reply = server.post("/v1/embeddings", {"input": "a"})
    assert reply.status_code == 400 and "task=embed" in reply.json()["error"]["message"]


def test_more_inputs_than_the_server_holds_are_refused(start_server) -> None:
    server = start_server(Behaviour(pooling=POOLING), max_queued_requests=3)
    assert server.post("/v1/embeddings", {"input": ["a"] * 3}).status_code == 200
    refused = server.post("/v1/embeddings", {"input": ["a"] * 4})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "input"


def test_an_engine_that_cannot_go_on_is_a_500(start_server) -> None:
    server = start_server(Behaviour(pooling=POOLING, error_at_token=0, error=FinishReason.ERROR))
    assert server.post("/v1/embeddings", {"input": "a"}).status_code == 500
