"""POST /v1/score and POST /v1/rerank: how well texts fit each other.

A model with a classification head reads each pair at once (cross-encoder); of any other the cosine of the texts' vectors is the score.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from toka.errors import RequestError
from toka.pooling import cosine
from toka.server.body import read_body
from toka.server.generation import Generation
from toka.server.openapi import describe
from toka.server.pooled import Pooled, tokenized
from toka.server.pooling_schemas import (
    DocumentText,
    PoolingFields,
    RerankReply,
    RerankRequest,
    RerankResult,
    Score,
    ScoreReply,
    ScoreRequest,
)
from toka.server.serving import serving_of

router = APIRouter()


@router.post("/v1/score", openapi_extra=describe(ScoreRequest, ScoreReply))
@router.post("/score", include_in_schema=False)
async def create_score(request: Request) -> Response:
    """Scores of pairs of texts."""
    start_time = time.perf_counter()
    serving = serving_of(request)
    pooled = Pooled(serving)
    body = await read_body(request, ScoreRequest)
    model = serving.check_model(body.model)
    run = await _score(pooled, *_pairs(body), body, ("text_1", "text_2"), start_time)

    def reply() -> ScoreReply:
        data = [Score(index, score) for index, score in enumerate(run.scores())]
        return ScoreReply(f"score-{uuid.uuid4().hex}", int(time.time()), model, data, pooled.usage(run.generation))

    return await pooled.respond(request, run.generation, reply)


@router.post("/v1/rerank", openapi_extra=describe(RerankRequest, RerankReply))
@router.post("/rerank", include_in_schema=False)
@router.post("/v2/rerank", include_in_schema=False)
async def create_rerank(request: Request) -> Response:
    """Documents in the order of their scores."""
    start_time = time.perf_counter()
    serving = serving_of(request)
    pooled = Pooled(serving)
    body = await read_body(request, RerankRequest)
    model = serving.check_model(body.model)
    if body.top_n < 0:
        raise RequestError(f"top_n must be 0 (all) or more, got {body.top_n}.", "top_n")
    documents = [each if isinstance(each, str) else each.text for each in body.documents]
    run = await _score(pooled, [body.query], documents, body, ("query", "documents"), start_time)

    def reply() -> RerankReply:
        results = [RerankResult(index, score) for index, score in enumerate(run.scores())]
        results.sort(key=lambda result: -result.relevance_score)  # of equals the one that was named first
        del results[body.top_n or len(results) :]
        if body.return_documents:
            for result in results:
                result.document = DocumentText(documents[result.index])
        return RerankReply(f"rerank-{uuid.uuid4().hex}", model, results, pooled.usage(run.generation))

    return await pooled.respond(request, run.generation, reply)


class _ScoreRun(NamedTuple):
    """Scoring under way; scores: to be called when the generation has finished."""

    generation: Generation
    scores: Callable[[], list[float]]


def _pairs(body: ScoreRequest) -> tuple[list[str], list[str]]:
    """The texts as lists of which the first has one entry or as many as the second."""
    firsts, seconds = ([text] if isinstance(text, str) else text for text in (body.text_1, body.text_2))
    if not firsts or not seconds:
        raise RequestError("text_1 and text_2 must not be empty lists.", "text_2" if firsts else "text_1")
    if len(firsts) not in (1, len(seconds)):
        raise RequestError(
            f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}: one to several, or as many of either.", "text_1"
        )
    return firsts, seconds


async def _score(
    pooled: Pooled,
    firsts: Sequence[str],
    seconds: Sequence[str],
    body: PoolingFields,
    params: tuple[str, str],
    start_time: float,
) -> _ScoreRun:
    """Begin to score each of seconds against its first, or the only one. params: what the client calls the two."""
    if pooled.pooling.task == "score":
        prompts = await _joined(pooled, list(firsts) * (len(seconds) if len(firsts) == 1 else 1), seconds, body)
        generation = pooled.submit(prompts, params[1], body.priority, start_time)
        return _ScoreRun(generation, lambda: [pooled.pooling.score(vector) for vector in pooled.vectors(generation)])
    texts = [*firsts, *seconds]
    prompts = await _encoded(pooled, texts, body, params[1])
    generation = pooled.submit(prompts, params[1], body.priority, start_time)

    def scores() -> list[float]:
        vectors = pooled.vectors(generation)
        ones, others = vectors[: len(firsts)], vectors[len(firsts) :]
        return [cosine(ones[index if len(ones) > 1 else 0], other) for index, other in enumerate(others)]

    return _ScoreRun(generation, scores)


async def _joined(
    pooled: Pooled, firsts: Sequence[str], seconds: Sequence[str], body: PoolingFields
) -> list[list[int]]:
    """One prompt a pair."""
    limit, tokenizer = pooled.tokens_kept(body), pooled.serving.tokenizer

    def work() -> list[list[int]]:
        encoded = [tokenizer.encode_pair(*pair, limit) for pair in zip(firsts, seconds, strict=True)]
        return [pooled.pooling.pair_ids(*pair) for pair in encoded]

    return await tokenized(work, [*firsts, *seconds])


async def _encoded(pooled: Pooled, texts: Sequence[str], body: PoolingFields, param: str) -> list[list[int]]:
    """One prompt a text."""
    limit, serving = pooled.tokens_kept(body), pooled.serving
    if limit is None:
        return await serving.encode(texts, param, add_special_tokens=True)
    return await tokenized(lambda: [serving.tokenizer.encode_cut(text, limit) for text in texts], texts)
