"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from toka.errors import RequestError
from toka.params import MAX_LOGPROBS
from toka.server.body import read_body
from toka.server.generation import Generation, TokenEvent
from toka.server.logprobs import chat_logprobs, prompt_logprobs
from toka.server.openapi import describe
from toka.server.request_context import current
from toka.server.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    PromptLogprobs,
)
from toka.server.serving import Serving, num_prompt_logprobs, serving_of, usage_of
from toka.server.stream import ChunkTemplate, respond
from toka.server.structured import structured_output

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=describe(ChatCompletionRequest, ChatCompletion, streams=True))
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    start_time = time.perf_counter()
    serving = serving_of(request)
    serving.check_admission()
    body = _one_max_tokens(await read_body(request, ChatCompletionRequest))
    num_top = _num_top(body)
    model = serving.check_model(body.model)
    structured = await structured_output(serving, body)
    prompt = await serving.encode_chat(
        body.messages, add_generation_prompt=body.add_generation_prompt, variables=body.chat_template_kwargs
    )
    generation = serving.submit(
        body,
        [prompt],
        prompt_param="messages",
        default_max_tokens=None,
        start_time=start_time,
        structured=structured,
        logprobs=num_top if body.logprobs else None,
        prompt_logprobs=num_prompt_logprobs(body),
        may_generate_nothing=body.prompt_logprobs is not UNSET,
    )
    head = {
        "id": f"chatcmpl-{current.get().request_id}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": serving.system_fingerprint,
    }

    return await respond(
        request,
        generation,
        abort=lambda: serving.engine.abort(generation),
        chunks=(lambda events: _chunks(serving, head, body, generation, events)) if body.stream else None,
        whole=lambda: _chat_completion(serving, head, body, generation),
    )


def _num_top(body: ChatCompletionRequest) -> int:
    """How many of the likeliest tokens are wanted. RequestError if top_logprobs is out of range or not to be had."""
    wanted = 0 if body.top_logprobs is UNSET else body.top_logprobs
    if not 0 <= wanted <= MAX_LOGPROBS:
        raise RequestError(f"top_logprobs must be between 0 and {MAX_LOGPROBS}.", "top_logprobs")
    if wanted and not body.logprobs:
        raise RequestError("top_logprobs is only allowed with logprobs: true.", "top_logprobs")
    return wanted


def _one_max_tokens(body: ChatCompletionRequest) -> ChatCompletionRequest:
    """The body with max_completion_tokens, the newer name, written into max_tokens."""
    if body.max_completion_tokens is UNSET:
        return body
    if body.max_tokens not in (UNSET, body.max_completion_tokens):
        raise RequestError("max_tokens and max_completion_tokens contradict each other.", "max_tokens")
    if body.max_completion_tokens < 1:
        raise RequestError("max_completion_tokens must be at least 1.", "max_completion_tokens")
    body.max_tokens = body.max_completion_tokens
    return body


async def _chunks(
    serving: Serving,
    head: dict[str, Any],
    body: ChatCompletionRequest,
    generation: Generation,
    events: AsyncIterator[list[TokenEvent]],
) -> AsyncIterator[bytes]:
    with_usage = body.stream_options is not UNSET and body.stream_options.include_usage
    template = ChunkTemplate(head, b'"delta":{"content":', b"}", with_usage=with_usage)
    role = b'"delta":{"role":"assistant","content":""}'
    yield b"".join(template.choice(sample.index, role) for sample in generation.samples)
    num_top = _num_top(body)

    def chunk(event: TokenEvent) -> bytes:
        if not event.scores:
            return template.token(event)
        return template.token(event, msgspec.json.encode(chat_logprobs(serving.tokenizer, event.scores, num_top)))

    async for batch in events:
        yield b"".join(map(chunk, batch))
    if with_usage:
        yield template.usage(usage_of(generation))


def _chat_completion(
    serving: Serving, head: dict[str, Any], body: ChatCompletionRequest, generation: Generation
) -> ChatCompletion:
    num_top = _num_top(body)
    choices = [
        ChatChoice(
            sample.index,
            AssistantMessage(sample.text),
            sample.finish_reason,
            chat_logprobs(serving.tokenizer, sample.scores, num_top) if body.logprobs else None,
        )
        for sample in generation.samples
    ]
    of_prompt: PromptLogprobs | UnsetType = UNSET
    if body.prompt_logprobs is not UNSET:
        of_prompt = prompt_logprobs(serving.tokenizer, generation.prompt_scores[0], body.prompt_logprobs)
    return ChatCompletion(**head, choices=choices, usage=usage_of(generation), prompt_logprobs=of_prompt)
