"""The way of prompts to their vectors, for all routes that want some."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from toka.errors import InvariantError, RequestError
from toka.params import SamplingParams
from toka.pooling import F32, tokens_kept
from toka.server.generation import Generation
from toka.server.pooling_schemas import PoolingFields, PromptUsage
from toka.server.serving import INLINE, Serving
from toka.server.stream import respond

_NOTHING_DRAWN = SamplingParams(max_tokens=0)

Result = TypeVar("Result")


class Pooled:
    """The pooling engine behind a server.

    Raises RequestError if it generates text instead, or has another task than the one wanted; CapacityError unless it takes requests now.
    """

    def __init__(self, serving: Serving, task: str | None = None):
        self.serving, self.ready = serving, serving.check_admission()
        if self.ready.pooling is None:
            raise RequestError(
                "This server generates text. Start it with task=embed, or with an embedding model.",
                status=400,
                code="wrong_task",
            )
        self.pooling = self.ready.pooling
        if task is not None and self.pooling.task != task:
            raise RequestError(
                "This server scores pairs of texts; use /v1/score or /v1/rerank.", status=400, code="wrong_task"
            )

    def submit(self, prompts: Sequence[Sequence[int]], param: str, priority: int, start_time: float) -> Generation:
        """Hand prompts to the engine. Raises RequestError naming param if one is empty or too long, CapacityError if the server is full."""
        for prompt in prompts:
            if len(prompt) > self.ready.max_request_tokens:
                raise RequestError(
                    f"{param} has a prompt of {len(prompt)} tokens; the model holds {self.ready.max_request_tokens}. "
                    "truncate_prompt_tokens=-1 cuts longer ones.",
                    param,
                    code="context_length_exceeded",
                )
        return self.serving.submit_prompts(
            prompts, _NOTHING_DRAWN, param=param, priority=priority, start_time=start_time
        )

    def tokens_kept(self, body: PoolingFields) -> int | None:
        """What prompts are to be cut to; None = they are not. RequestError if truncate_prompt_tokens is out of range."""
        wanted = body.truncate_prompt_tokens
        return tokens_kept(None if wanted is UNSET else wanted, self.ready.max_request_tokens)

    def vectors(self, generation: Generation) -> list[F32]:
        """The finished generation's vectors, as they were pooled."""
        vectors = [sample.vector for sample in generation.samples]
        if any(vector is None for vector in vectors):
            raise InvariantError("the engine ended a prompt without its vector")
        return vectors  # type: ignore[return-value]

    def usage(self, generation: Generation) -> PromptUsage:
        num_tokens = sum(generation.num_prompt_tokens)
        return PromptUsage(num_tokens, num_tokens)

    async def respond(self, request: Request, generation: Generation, reply: Callable[[], msgspec.Struct]) -> Response:
        """The reply, once the vectors are there; the engine stops if the client leaves before."""
        engine = self.serving.engine
        return await respond(request, generation, abort=lambda: engine.abort(generation), chunks=None, whole=reply)


async def tokenized(work: Callable[[], Result], texts: Sequence[str]) -> Result:
    """The result of work, done in a thread if there is much of it."""
    return work() if sum(map(len, texts)) <= INLINE else await asyncio.to_thread(work)
