"""POST /v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from toka.errors import RequestError
from toka.server.body import read_body
from toka.server.generation import Generation, TokenEvent
from toka.server.openapi import describe
from toka.server.schemas import Completion, CompletionChoice, CompletionRequest, GenerationFields, Prompt
from toka.server.serving import Serving, serving_of, usage_of
from toka.server.stream import ChunkTemplate, respond

DEFAULT_MAX_TOKENS = 16  # OpenAI's

router = APIRouter()


@router.post("/v1/completions", openapi_extra=describe(CompletionRequest, Completion, streams=True))
async def create_completion(request: Request) -> Response:
    """Continue a text, or several."""
    start_time = time.perf_counter()
    serving = serving_of(request)
    serving.check_admission()
    body = await read_body(request, CompletionRequest)
    model = serving.check_model(body.model)
    prompts = await _token_prompts(serving, body.prompt, add_special_tokens=body.add_special_tokens)
    generation = serving.submit(
        body, prompts, prompt_param="prompt", default_max_tokens=DEFAULT_MAX_TOKENS, start_time=start_time
    )
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": serving.system_fingerprint,
    }

    return await respond(
        request,
        generation,
        abort=lambda: serving.engine.abort(generation),
        chunks=(lambda events: _chunks(head, body, generation, events)) if body.stream else None,
        whole=lambda: _completion(head, generation),
    )


async def _token_prompts(serving: Serving, prompt: Prompt, *, add_special_tokens: bool) -> Sequence[Sequence[int]]:
    texts, token_prompts = prompts_of(prompt)
    if texts:
        return await serving.encode(texts, "prompt", add_special_tokens=add_special_tokens)
    return token_prompts


def prompts_of(prompt: Prompt) -> tuple[list[str], list[list[int]]]:
    """The texts, or the token prompts, that `prompt` holds; one of the two is empty. RequestError if it mixes them."""
    if isinstance(prompt, str):
        return [prompt], []
    kinds = {type(entry) for entry in prompt}
    if kinds == {str}:
        return prompt, []  # type: ignore[return-value]
    if kinds == {int}:
        return [], [prompt]  # type: ignore[list-item]
    if kinds == {list}:
        return [], prompt  # type: ignore[return-value]
    rule = "must not mix texts and token ids" if kinds else "must not be empty"
    raise RequestError(f"prompt {rule}.", "prompt")


async def _chunks(
    head: dict[str, Any], body: GenerationFields, generation: Generation, events: AsyncIterator[list[TokenEvent]]
) -> AsyncIterator[bytes]:
    with_usage = body.stream_options is not UNSET and body.stream_options.include_usage
    template = ChunkTemplate(head, b'"text":', b"", with_usage=with_usage)
    async for batch in events:
        yield b"".join(map(template.token, batch))
    if with_usage:
        yield template.usage(usage_of(generation))


def _completion(head: dict[str, Any], generation: Generation) -> Completion:
    choices = [CompletionChoice(sample.index, sample.text, sample.finish_reason) for sample in generation.samples]
    return Completion(**head, choices=choices, usage=usage_of(generation))
