"""POST /v1/abort: end a request from outside, say one whose client is stuck, or whose answer nobody needs any more."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from toka.errors import RequestError
from toka.server.body import read_body
from toka.server.openapi import describe
from toka.server.request_context import current
from toka.server.schemas import AbortReply, AbortRequest
from toka.server.serving import serving_of

router = APIRouter()


@router.post("/v1/abort", openapi_extra=describe(AbortRequest, AbortReply))
async def abort(request: Request) -> Response:
    """End what runs under a request id and belongs to this key; the admin key may end anybody's."""
    serving = serving_of(request)
    body = await read_body(request, AbortRequest)
    generations = serving.running.of(body.request_id, current.get().caller)
    if not generations:
        raise RequestError(
            f"Nothing of yours runs as {body.request_id[:80]!r}.", "request_id", status=404, code="request_not_found"
        )
    for generation in generations:
        serving.engine.abort(generation)
    return Response(msgspec.json.encode(AbortReply(body.request_id, len(generations))), media_type="application/json")
