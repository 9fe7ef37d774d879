"""/v1/score and /v1/rerank: cosines of vectors, a classification head's numbers, orders, shapes, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from fake_engine import VOCAB_SIZE, Behaviour, vector_of
from running_server import RunningServer

from toka.config import Config
from toka.pooling import Pooling
from toka.text.tokenizer import Tokenizer

WIDTH = 6
EMBED = Pooling(task="embed", mode="cls", normalize=True, is_encoder=True, width=WIDTH)
CLASSIFY = Pooling(
    task="score",
    mode="cls",
    normalize=False,
    is_encoder=True,
    applies_sigmoid=True,
    width=1,
    num_token_types=2,
    vocab_size=VOCAB_SIZE,
)


def started(tokenizer: Tokenizer, pooling: Pooling) -> RunningServer:
    return RunningServer(tokenizer, Config(), Behaviour(pooling=pooling, max_request_tokens=30))


@pytest.fixture(scope="module")
def bi_encoder(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with started(tokenizer, EMBED) as running:
        yield running


@pytest.fixture(scope="module")
def cross_encoder(tokenizer: Tokenizer) -> Iterator[RunningServer]:
    with started(tokenizer, CLASSIFY) as running:
        yield running


def cosine_of(first: str, second: str) -> float:
    one, other = (vector_of(list(text.encode()), WIDTH).astype(np.float64) for text in (first, second))
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def head_of(first: str, second: str) -> float:
    """The second text's tokens are of another type, so their ids lie beyond the vocabulary."""
    prompt = [*first.encode(), *(VOCAB_SIZE + byte for byte in second.encode())]
    return 1 / (1 + math.exp(-float(vector_of(prompt, 1)[0])))


SHAPES = [
    ("ab", "cd", [("ab", "cd")]),
    ("ab", ["cd", "ef", "ab"], [("ab", "cd"), ("ab", "ef"), ("ab", "ab")]),
    (["ab", "gh"], ["cd", "ef"], [("ab", "cd"), ("gh", "ef")]),
    (["ab"], ["cd", "ef"], [("ab", "cd"), ("ab", "ef")]),
]


@pytest.mark.parametrize(("text_1", "text_2", "pairs"), SHAPES)
@pytest.mark.parametrize("path", ["/v1/score", "/score"])
def test_cosines_of_vectors(
    bi_encoder: RunningServer, path: str, text_1: object, text_2: object, pairs: list[tuple[str, str]]
) -> None:
    reply = bi_encoder.post(path, {"text_1": text_1, "text_2": text_2}).json()
    assert [entry["index"] for entry in reply["data"]] == list(range(len(pairs)))
    assert [entry["score"] for entry in reply["data"]] == pytest.approx([cosine_of(*pair) for pair in pairs], abs=1e-6)


@pytest.mark.parametrize(("text_1", "text_2", "pairs"), SHAPES)
def test_a_heads_numbers(
    cross_encoder: RunningServer, text_1: object, text_2: object, pairs: list[tuple[str, str]]
) -> None:
    reply = cross_encoder.post("/v1/score", {"text_1": text_1, "text_2": text_2}).json()
    assert [entry["score"] for entry in reply["data"]] == pytest.approx([head_of(*pair) for pair in pairs], abs=1e-6)
    num_tokens = sum(len(first) + len(second) for first, second in pairs)
    assert reply["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder"])
def test_the_best_documents_come_first(request: pytest.FixtureRequest, kind: str, path: str) -> None:
    server, score = request.getfixturevalue(kind), cosine_of if kind == "bi_encoder" else head_of
    documents = ["one", {"text": "two"}, "three", "four"]
    texts = ["one", "two", "three", "four"]
    reply = server.post(path, {"query": "q", "documents": documents, "top_n": 3}).json()
    expected = sorted(range(4), key=lambda i: -score("q", texts[i]))[:3]
    assert [result["index"] for result in reply["results"]] == expected
    for result in reply["results"]:
        assert result["document"] == {"text": texts[result["index"]]}
        assert result["relevance_score"] == pytest.approx(score("q", texts[result["index"]]), abs=1e-6)
    reply = server.post(path, {"query": "q", "documents": documents, "return_documents": False}).json()
    assert len(reply["results"]) == 4 and all(set(r) == {"index", "relevance_score"} for r in reply["results"])


def test_long_pairs_are_refused_or_cut_at_the_longer_text(cross_encoder: RunningServer) -> None:
    short, long = "abcd", "x" * 40
    refused = cross_encoder.post("/v1/score", {"text_1": short, "text_2": long})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "text_2"
    for truncate, kept in ((-1, (4, 26)), (10, (4, 6)), (5, (2, 3))):
        reply = cross_encoder.post(
            "/v1/score", {"text_1": short, "text_2": long, "truncate_prompt_tokens": truncate}
        ).json()
        assert reply["data"][0]["score"] == pytest.approx(head_of(short[: kept[0]], long[: kept[1]]), abs=1e-6)


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1", "must not be empty"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2", "must not be empty"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1", "2 texts and text_2 3"),
        ("/v1/score", {"text_1": "a"}, "text_2", "is required"),
        ("/v1/rerank", {"query": "q", "documents": []}, "documents", "length >= 1"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "top_n": -1}, "top_n", "0 (all) or more, got -1"),
        ("/v1/rerank", {"query": "q", "documents": [{"title": "a"}]}, "documents", "title: is not supported"),
        ("/v1/rerank", {"query": "q", "documents": ["a"], "rank_fields": ["t"]}, "rank_fields", "not supported"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    bi_encoder: RunningServer, path: str, body: object, param: str, words: str
) -> None:
    reply = bi_encoder.post(path, body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param and words in reply.json()["error"]["message"]


def test_a_model_that_scores_pairs_has_no_embeddings(cross_encoder: RunningServer) -> None:
    reply = cross_encoder.post("/v1/embeddings", {"input": "a"})
    assert reply.status_code == 400 and "/v1/rerank" in reply.json()["error"]["message"]
