"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import time
import uuid

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from toka.pooling import F32
from toka.server.body import read_body
from toka.server.completions import prompts_of
from toka.server.openapi import describe
from toka.server.pooled import Pooled, tokenized
from toka.server.pooling_schemas import Embedding, EmbeddingReply, EmbeddingRequest
from toka.server.serving import Serving, serving_of

router = APIRouter()


@router.post("/v1/embeddings", openapi_extra=describe(EmbeddingRequest, EmbeddingReply))
async def create_embeddings(request: Request) -> Response:
    """A vector for each input."""
    start_time = time.perf_counter()
    serving = serving_of(request)
    pooled = Pooled(serving, "embed")
    body = await read_body(request, EmbeddingRequest)
    model, pooling = serving.check_model(body.model), pooled.pooling
    dimensions = None if body.dimensions is UNSET else body.dimensions
    if dimensions is not None:
        pooling.check_dimensions(dimensions)
    normalize = None if body.normalize is UNSET else body.normalize
    generation = pooled.submit(await _prompts(serving, pooled, body), "input", body.priority, start_time)

    def reply() -> EmbeddingReply:
        vectors = [pooling.finish(vector, dimensions, normalize) for vector in pooled.vectors(generation)]
        data = [Embedding(index, _encoded(vector, body.encoding_format)) for index, vector in enumerate(vectors)]
        return EmbeddingReply(f"embd-{uuid.uuid4().hex}", int(time.time()), model, data, pooled.usage(generation))

    return await pooled.respond(request, generation, reply)


async def _prompts(serving: Serving, pooled: Pooled, body: EmbeddingRequest) -> list[list[int]]:
    """The inputs' token ids, cut to what was asked for."""
    texts, prompts = prompts_of(body.input, "input")
    limit, tokenizer = pooled.tokens_kept(body), serving.tokenizer
    if not texts:
        serving.check_prompts(prompts, "input", pooled.ready.vocab_size)
        return [prompt[:limit] for prompt in prompts]
    if limit is None:
        return await serving.encode(texts, "input", add_special_tokens=body.add_special_tokens)
    if not body.add_special_tokens:
        return await tokenized(lambda: [tokenizer.encode(text, False)[:limit] for text in texts], texts)
    return await tokenized(lambda: [tokenizer.encode_cut(text, limit) for text in texts], texts)


def _encoded(vector: F32, encoding_format: str) -> list[float] | str:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
