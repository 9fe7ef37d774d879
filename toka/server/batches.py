"""/v1/batches: many requests from a file, answered when there is room."""

from __future__ import annotations

import re
from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response
from msgspec import UNSET

from toka.errors import RequestError
from toka.server.batch_runner import BatchRunner
from toka.server.body import read_body
from toka.server.files import check_limit, check_query, json_reply, store_of
from toka.server.openapi import describe
from toka.server.request_context import current
from toka.server.schemas import BatchRequest
from toka.server.store import Batch

_MAX_PAGE = 100
_MAX_METADATA, _MAX_METADATA_KEY_CHARS, _MAX_METADATA_VALUE_CHARS = 16, 64, 512  # OpenAI's
_WINDOW = re.compile(r"([1-9][0-9]{0,5})([smhd])", re.ASCII)
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_MAX_WINDOW_S = 14 * 86400

router = APIRouter()


class BatchList(msgspec.Struct):
    data: list[Batch]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


def _runner_of(request: Request) -> BatchRunner:
    store_of(request)
    runner: BatchRunner = request.app.state.batch_runner
    return runner


@router.post("/v1/batches", openapi_extra=describe(BatchRequest, Batch))
async def create_batch(request: Request) -> Response:
    """Run the requests in a file."""
    store, runner = store_of(request), _runner_of(request)
    body = await read_body(request, BatchRequest)
    if body.endpoint not in runner.endpoints:
        raise RequestError(f"endpoint: must be one of {', '.join(runner.endpoints)}.", "endpoint")
    metadata = None if body.metadata is UNSET else _checked_metadata(body.metadata)
    batch = await store.run(
        store.add_batch,
        current.get().caller,
        body.endpoint,
        body.input_file_id,
        body.completion_window,
        _window_s(body.completion_window),
        metadata,
    )
    runner.begin(batch, current.get().caller.owner)
    return json_reply(batch)


@router.get("/v1/batches", openapi_extra=describe(None, BatchList))
async def list_batches(request: Request, after: str | None = None, limit: int = 20) -> Response:
    """The batches of this key, newest first."""
    store = store_of(request)
    check_query(request, "after", "limit")
    check_limit(limit, _MAX_PAGE)
    batches, has_more = await store.run(store.batches, current.get().caller, after, limit)
    return json_reply(
        BatchList(batches, has_more, batches[0].id if batches else None, batches[-1].id if batches else None)
    )


@router.get("/v1/batches/{batch_id}", openapi_extra=describe(None, Batch))
async def retrieve_batch(request: Request, batch_id: str) -> Response:
    """How far it is."""
    store = store_of(request)
    return json_reply(await store.run(store.batch, batch_id, current.get().caller))


@router.post("/v1/batches/{batch_id}/cancel", openapi_extra=describe(None, Batch))
async def cancel_batch(request: Request, batch_id: str) -> Response:
    """End it; what is answered stays."""
    store, runner = store_of(request), _runner_of(request)
    batch = await store.run(store.batch, batch_id, current.get().caller)
    if not await runner.cancel(batch_id):
        raise RequestError(f"The batch is {batch.status}: nothing is left to cancel.", "batch_id", status=409)
    return json_reply(await store.run(store.batch, batch_id, current.get().caller))


def _window_s(window: str) -> int:
    found = _WINDOW.fullmatch(window)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 1 <= seconds <= _MAX_WINDOW_S:
        raise RequestError(
            "completion_window: must be a time such as 24h, 90m or 7d, 14d at most.", "completion_window"
        )
    return seconds


def _checked_metadata(metadata: dict[str, str]) -> dict[str, str]:
    too_long = any(
        len(key) > _MAX_METADATA_KEY_CHARS or len(value) > _MAX_METADATA_VALUE_CHARS for key, value in metadata.items()
    )
    if len(metadata) > _MAX_METADATA or too_long:
        raise RequestError(
            f"metadata can hold {_MAX_METADATA} entries, with keys of {_MAX_METADATA_KEY_CHARS} and values of "
            f"{_MAX_METADATA_VALUE_CHARS} characters at most.",
            "metadata",
        )
    return metadata
