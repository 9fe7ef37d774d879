"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Literal

import msgspec
import orjson
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from toka.errors import RequestError, TokaError
from toka.server.body import read_body
from toka.server.conversation import Conversation, ToolUse, fields_named, json_output, prepare, tool_of
from toka.server.error_replies import error_detail
from toka.server.generation import Generation, Sample, TokenEvent
from toka.server.message_blocks import BlockEvents, Event, blocks_of, messages_of_turns
from toka.server.openapi import describe
from toka.server.reply_deltas import parts_of_event, said_by
from toka.server.schemas import (
    CountTokensReply,
    CountTokensRequest,
    ErrorDetail,
    GenerationFields,
    MessagesReply,
    MessagesRequest,
    MessagesUsage,
)
from toka.server.serving import Serving, serving_of, usage_of
from toka.server.stream import respond

router = APIRouter()

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_OUR_NAMES = {
    "stop": "stop_sequences",
    "reasoning_budget": "thinking",
    "reasoning_effort": "thinking",
    "continue_final_message": "messages",
}

Endpoint = Callable[[Request], Awaitable[Response]]


def _with_own_errors(endpoint: Endpoint) -> Endpoint:
    """The endpoint with its errors in Anthropic's form."""

    @functools.wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except TokaError as error:
            status, detail, headers = error_detail(error)
            return Response(orjson.dumps(_error(detail, status)), status, headers, "application/json")

    return answer


def _error(detail: ErrorDetail, status: int = 500) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": detail.message, "param": detail.param}}


@router.post("/v1/messages", openapi_extra=describe(MessagesRequest, MessagesReply, streams=True))
@_with_own_errors
async def create_message(request: Request) -> Response:
    """Answer a conversation, in blocks."""
    start_time = time.perf_counter()
    serving = serving_of(request)
    serving.check_admission()
    body = await read_body(request, MessagesRequest)
    model = serving.check_model(body.model)
    with fields_named(_OUR_NAMES):
        prompt = await prepare(serving, _conversation_of(serving, body))
        generation = serving.submit(
            _generation_fields(body),
            [prompt.token_ids],
            prompt_param="messages",
            default_max_tokens=None,
            start_time=start_time,
            reading=prompt.reading,
            structured=prompt.structured,
        )
    head = {"id": f"msg_{uuid.uuid4().hex}", "model": model}
    return await respond(
        request,
        generation,
        abort=lambda: serving.engine.abort(generation),
        chunks=(lambda events: _events(head, generation, events)) if body.stream else None,
        whole=lambda: _reply(head, generation, ended=True),
        error_chunk=lambda detail: _event(_error(detail)),
        done=b"",
    )


@router.post("/v1/messages/count_tokens", openapi_extra=describe(CountTokensRequest, CountTokensReply))
@_with_own_errors
async def count_tokens(request: Request) -> Response:
    """The length of a conversation's prompt, in tokens."""
    serving = serving_of(request)
    body = await read_body(request, CountTokensRequest)
    serving.check_model(body.model)
    with fields_named(_OUR_NAMES):
        prompt = await prepare(serving, _conversation_of(serving, body))
    return Response(msgspec.json.encode(CountTokensReply(len(prompt.token_ids))), media_type="application/json")


def _conversation_of(serving: Serving, body: CountTokensRequest) -> Conversation:
    messages = messages_of_turns(body.messages, body.system)
    is_begun = messages[-1]["role"] == "assistant"
    structured = None
    if body.output_config is not UNSET and body.output_config.format is not None:
        structured = json_output(body.output_config.format.schema, "output_config")
    thinking = None if body.thinking is UNSET else body.thinking
    if thinking is not None and (thinking.budget_tokens is not None) != (thinking.type == "enabled"):
        raise RequestError("thinking: budget_tokens goes with type enabled, and with no other.", "thinking")
    can_skip = serving.replies is not None and serving.replies.reasoning is not None
    return Conversation(
        messages,
        _tool_use(body),
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        reasoning_effort="none" if thinking is not None and thinking.type == "disabled" and can_skip else None,
        reasoning_budget=None if thinking is None else thinking.budget_tokens,
        structured=structured,
        structured_param="output_config",
    )


def _tool_use(body: CountTokensRequest) -> ToolUse:
    tools = [tool_of(tool.name, tool.description, tool.input_schema, tool.strict) for tool in body.tools]
    if body.tool_choice is UNSET:
        return ToolUse(tools)
    choice = body.tool_choice
    if bool(choice.name) != (choice.type == "tool"):
        raise RequestError("tool_choice: name goes with type tool, and with no other.", "tool_choice")
    parallel = not choice.disable_parallel_tool_use
    match choice.type:
        case "tool":
            return ToolUse(tools, "required", [choice.name], parallel)
        case "any":
            return ToolUse(tools, "required", None, parallel)
        case "auto":
            return ToolUse(tools, "auto", None, parallel)
        case "none":
            return ToolUse(tools, "none")


def _generation_fields(body: MessagesRequest) -> GenerationFields:
    return GenerationFields(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        stream=body.stream,
    )


def _reply(head: dict[str, Any], generation: Generation, *, ended: bool) -> MessagesReply:
    """The message as it is at the end, or before it says anything."""
    [sample] = generation.samples
    usage = usage_of(generation)
    cached = usage.prompt_tokens_details.cached_tokens
    return MessagesReply(
        **head,
        content=blocks_of(said_by(sample)) if ended else [],
        stop_reason=_stop_reason(sample) if ended else None,
        stop_sequence=sample.stop_string,
        usage=MessagesUsage(usage.prompt_tokens - cached, cached, usage.completion_tokens),
    )


def _stop_reason(sample: Sample) -> Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]:
    if sample.finish_reason == "length":
        return "max_tokens"
    if said_by(sample).tool_calls:
        return "tool_use"
    return "end_turn" if sample.stop_string is None else "stop_sequence"


async def _events(
    head: dict[str, Any], generation: Generation, events: AsyncIterator[list[TokenEvent]]
) -> AsyncIterator[bytes]:
    """The stream: the message as it begins, its blocks as they grow, how it ended."""
    begun = _reply(head, generation, ended=False)
    yield _event({"type": "message_start", "message": {**msgspec.to_builtins(begun), "stop_sequence": None}})
    [sample] = generation.samples
    blocks = BlockEvents()
    async for batch in events:
        if said := [event for token in batch for event in blocks.take(parts_of_event(sample, token))]:
            yield b"".join(map(_event, said))
    ended = msgspec.to_builtins(_reply(head, generation, ended=True))
    delta = {"stop_reason": ended["stop_reason"], "stop_sequence": ended["stop_sequence"]}
    last: list[Event] = [
        *blocks.finish(),
        {"type": "message_delta", "delta": delta, "usage": ended["usage"]},
        {"type": "message_stop"},
    ]
    yield b"".join(map(_event, last))


def _event(fields: Event) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), orjson.dumps(fields))
