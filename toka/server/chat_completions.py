"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, Request, Response
from msgspec import UNSET, UnsetType

from toka.errors import RequestError
from toka.params import MAX_LOGPROBS, StructuredOutput
from toka.server.body import read_body
from toka.server.conversation import Conversation, ToolUse, adds_generation_prompt, messages_of, prepare, tools_of
from toka.server.generation import Generation, TokenEvent
from toka.server.logprobs import chat_logprobs, prompt_logprobs
from toka.server.openapi import describe
from toka.server.reply_deltas import delta_of, finish_reason_of, message_of
from toka.server.request_context import current
from toka.server.schemas import (
    AllowedToolsChoice,
    ChatChoice,
    ChatCompletion,
    ChatCompletionRequest,
    ChatLogprobs,
    NamedTool,
)
from toka.server.serving import num_prompt_logprobs, serving_of, timings_of, usage_of
from toka.server.stream import ChunkTemplate, respond
from toka.server.structured import structured_output
from toka.text.held_scores import ScoredToken
from toka.text.tokenizer import Tokenizer

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
    conversation = _conversation_of(body, await structured_output(serving, body))
    prompt = await prepare(serving, conversation)
    [token_ids] = serving.truncated(body, [prompt.token_ids])
    generation = serving.submit(
        body,
        [token_ids],
        prompt_param="messages",
        default_max_tokens=None,
        start_time=start_time,
        logprobs=num_top if body.logprobs else None,
        prompt_logprobs=num_prompt_logprobs(body),
        may_generate_nothing=body.prompt_logprobs is not UNSET,
        reading=prompt.reading,
        structured=prompt.structured,
    )
    head = {
        "id": f"chatcmpl-{current.get().request_id}",
        "object": "chat.completion.chunk" if body.stream else "chat.completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": serving.system_fingerprint,
    }

    replies = _Replies(serving.tokenizer, body, generation, token_ids)
    return await respond(
        request,
        generation,
        abort=lambda: serving.engine.abort(generation),
        chunks=(lambda events: _chunks(head, replies, events)) if body.stream else None,
        whole=lambda: replies.whole(head),
    )


def _conversation_of(body: ChatCompletionRequest, structured: StructuredOutput | None) -> Conversation:
    return Conversation(
        messages_of(body.messages),
        _tool_use(body),
        add_generation_prompt=adds_generation_prompt(body),
        continue_final_message=body.continue_final_message,
        template=None if body.chat_template is UNSET else body.chat_template,
        variables=body.chat_template_kwargs,
        reasoning_effort=None if body.reasoning_effort is UNSET else body.reasoning_effort,
        reasoning_budget=_reasoning_budget(body),
        structured=structured,
    )


def _tool_use(body: ChatCompletionRequest) -> ToolUse:
    tools = tools_of(body.tools)
    match body.tool_choice:
        case NamedTool(function):
            return ToolUse(tools, "required", [function.name], parallel=False)
        case AllowedToolsChoice(allowed):
            names = [tool.function.name for tool in allowed.tools]
            return ToolUse(tools, allowed.mode, names, body.parallel_tool_calls)
        case UnsetType():
            return ToolUse(tools, "auto", None, body.parallel_tool_calls)
        case choice:
            return ToolUse(tools, choice, None, body.parallel_tool_calls)


def _reasoning_budget(body: ChatCompletionRequest) -> int | None:
    given = {budget for budget in (body.reasoning_budget, body.thinking_token_budget) if budget is not UNSET}
    if len(given) > 1:
        raise RequestError("reasoning_budget and thinking_token_budget contradict each other.", "reasoning_budget")
    return next(iter(given), None)


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


class _Replies:
    """What the choices of one request say. prompt: its token ids."""

    def __init__(
        self, tokenizer: Tokenizer, body: ChatCompletionRequest, generation: Generation, prompt: Sequence[int]
    ):
        self.body, self.generation, self.prompt = body, generation, list(prompt)
        self._tokenizer = tokenizer
        self._num_top = _num_top(body)

    def logprobs_of(self, scores: Sequence[ScoredToken]) -> ChatLogprobs:
        """Of these generated tokens."""
        return chat_logprobs(self._tokenizer, scores, self._num_top)

    def whole(self, head: dict[str, Any]) -> ChatCompletion:
        """All choices, at the end."""
        body, generation = self.body, self.generation
        reply = ChatCompletion(**head, choices=[], usage=usage_of(generation))
        for sample in generation.samples:
            reason = finish_reason_of(sample, sample.finish_reason)
            logprobs = self.logprobs_of(sample.scores) if body.logprobs else None
            choice = ChatChoice(sample.index, message_of(sample), reason, logprobs)
            if body.return_token_ids:
                choice.token_ids = sample.token_ids
            reply.choices.append(choice)
        if body.prompt_logprobs is not UNSET:
            scores = generation.prompt_scores[0]
            reply.prompt_logprobs = prompt_logprobs(self._tokenizer, scores, body.prompt_logprobs)
        if body.return_token_ids:
            reply.prompt_token_ids = self.prompt
        if body.return_timings:
            reply.timings = timings_of(generation)
        return reply


async def _chunks(
    head: dict[str, Any], replies: _Replies, events: AsyncIterator[list[TokenEvent]]
) -> AsyncIterator[bytes]:
    body, generation = replies.body, replies.generation
    template = ChunkTemplate(
        head, b'"delta":{"content":', b"}", options=body.stream_options, usage=lambda: usage_of(generation)
    )
    role = b'"delta":{"role":"assistant","content":""}'
    prompt_ids = b',"prompt_token_ids":%b' % msgspec.json.encode(replies.prompt) if body.return_token_ids else b""
    yield b"".join(template.choice(sample.index, role, more=prompt_ids) for sample in generation.samples)

    def chunk(event: TokenEvent) -> bytes:
        logprobs = msgspec.json.encode(replies.logprobs_of(event.scores)) if event.scores else b"null"
        more = b""
        if body.return_token_ids:
            more = b',"token_ids":%b' % msgspec.json.encode([event.token_id] if event.token_id >= 0 else [])
        sample = generation.samples[event.choice]
        if sample.reader is None:
            return template.token(event, logprobs, more)
        if not (event.parts or event.finish_reason or event.scores or more):
            return b""  # a part of a mark, or of a name that is not whole
        delta = b'"delta":' + orjson.dumps(delta_of(event.parts))
        return template.choice(event.choice, delta, logprobs, finish_reason_of(sample, event.finish_reason), more)

    async for batch in events:
        if said := b"".join(map(chunk, batch)):
            yield said
    yield template.last((lambda: timings_of(generation)) if body.return_timings else None)
