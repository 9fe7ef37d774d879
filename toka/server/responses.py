"""POST /v1/responses, as far as it needs no memory: the client sends the whole conversation each time."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import orjson
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from toka.errors import RequestError
from toka.params import StructuredOutput
from toka.server.body import read_body
from toka.server.conversation import Conversation, ToolUse, fields_named, json_output, prepare, tool_of
from toka.server.generation import Generation, TokenEvent
from toka.server.openapi import describe
from toka.server.reply_deltas import parts_of_event, said_by
from toka.server.response_items import OutputItems, messages_of_items
from toka.server.schemas import (
    AllowedResponseTools,
    ErrorDetail,
    GenerationFields,
    IncompleteDetails,
    InputTokensDetails,
    JsonObjectFormat,
    NamedResponseTool,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    SchemaFormat,
)
from toka.server.serving import serving_of, usage_of
from toka.server.stream import respond

router = APIRouter()


@router.post("/v1/responses", openapi_extra=describe(ResponsesRequest, ResponseObject, streams=True))
async def create_response(request: Request) -> Response:
    """Answer a conversation, in items."""
    start_time = time.perf_counter()
    serving = serving_of(request)
    serving.check_admission()
    body = await read_body(request, ResponsesRequest)
    model = serving.check_model(body.model)
    with fields_named(
        {
            "max_tokens": "max_output_tokens",
            "messages": "input",
            "reasoning_effort": "reasoning",
            "response_format": "text",
        }
    ):
        prompt = await prepare(serving, _conversation_of(body))
        generation = serving.submit(
            _generation_fields(body),
            [prompt.token_ids],
            prompt_param="input",
            default_max_tokens=None,
            start_time=start_time,
            reading=prompt.reading,
            structured=prompt.structured,
        )
    response = _begun(body, model)
    number = itertools.count()
    return await respond(
        request,
        generation,
        abort=lambda: serving.engine.abort(generation),
        chunks=(lambda events: _events(response, generation, number, events)) if body.stream else None,
        whole=lambda: _whole(response, generation),
        error_chunk=lambda detail: _event({"type": "error", **_error_fields(detail)}, number),
        done=b"",
    )


def _conversation_of(body: ResponsesRequest) -> Conversation:
    messages = messages_of_items(body.input, None if body.instructions is UNSET else body.instructions)
    if not messages:
        raise RequestError("input must not be empty.", "input")
    return Conversation(
        messages,
        _tool_use(body),
        variables=body.chat_template_kwargs,
        reasoning_effort=body.reasoning.effort,
        reasoning_budget=None if body.reasoning_budget is UNSET else body.reasoning_budget,
        structured=_structured(body),
        structured_param="text",
    )


def _tool_use(body: ResponsesRequest) -> ToolUse:
    tools = [tool_of(tool.name, tool.description, tool.parameters, tool.strict) for tool in body.tools]
    match body.tool_choice:
        case NamedResponseTool(name):
            return ToolUse(tools, "required", [name], parallel=False)
        case AllowedResponseTools(mode, allowed):
            return ToolUse(tools, mode, [tool.name for tool in allowed], body.parallel_tool_calls)
        case choice:
            return ToolUse(tools, choice, None, body.parallel_tool_calls)


def _structured(body: ResponsesRequest) -> StructuredOutput | None:
    match body.text.format:
        case JsonObjectFormat():
            return json_output({"type": "object"}, "text")
        case SchemaFormat(schema=schema):
            return json_output(schema, "text")
        case _:
            return None


def _generation_fields(body: ResponsesRequest) -> GenerationFields:
    return GenerationFields(
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        seed=body.seed,
        cache_salt=body.cache_salt,
        priority=body.priority,
        stream=body.stream,
    )


def _begun(body: ResponsesRequest, model: str) -> ResponseObject:
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}",
        created_at=int(time.time()),
        model=model,
        status="in_progress",
        output=[],
        instructions=None if body.instructions is UNSET else body.instructions,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        text=body.text,
        reasoning=body.reasoning,
        max_output_tokens=None if body.max_output_tokens is UNSET else body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        metadata=body.metadata,
        user=body.user or None,
    )


def _ended(response: ResponseObject, generation: Generation, items: OutputItems) -> ResponseObject:
    [sample] = generation.samples
    is_cut = sample.finish_reason == "length"
    usage = usage_of(generation)
    return msgspec.structs.replace(
        response,
        status="incomplete" if is_cut else "completed",
        incomplete_details=IncompleteDetails("max_output_tokens") if is_cut else None,
        output=items.items,
        usage=ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            usage.completion_tokens_details,
            usage.total_tokens,
        ),
    )


def _whole(response: ResponseObject, generation: Generation) -> ResponseObject:
    [sample] = generation.samples
    items = OutputItems()
    list(items.take(said_by(sample).parts()))
    list(items.finish("incomplete" if sample.finish_reason == "length" else "completed"))
    return _ended(response, generation, items)


async def _events(
    response: ResponseObject,
    generation: Generation,
    number: itertools.count[int],
    events: AsyncIterator[list[TokenEvent]],
) -> AsyncIterator[bytes]:
    """The stream: the response as it begins, its items as they grow, the response as it ended."""

    def of_response(kind: str, response: ResponseObject) -> bytes:
        return _event({"type": f"response.{kind}", "response": msgspec.to_builtins(response)}, number)

    yield of_response("created", response) + of_response("in_progress", response)
    [sample] = generation.samples
    items = OutputItems()
    async for batch in events:
        said = [event for token in batch for event in items.take(parts_of_event(sample, token))]
        if said:
            yield b"".join(_event(event, number) for event in said)
    closing = items.finish("incomplete" if sample.finish_reason == "length" else "completed")
    last = b"".join([_event(event, number) for event in closing])
    ended = _ended(response, generation, items)
    yield last + of_response(ended.status, ended)


def _event(fields: dict[str, Any], number: itertools.count[int]) -> bytes:
    data = orjson.dumps({**fields, "sequence_number": next(number)})
    return b"event: %b\ndata: %b\n\n" % (fields["type"].encode(), data)


def _error_fields(detail: ErrorDetail) -> dict[str, Any]:
    return {"code": detail.code or detail.type, "message": detail.message, "param": detail.param}
