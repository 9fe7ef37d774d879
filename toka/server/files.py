"""/v1/files: what batches read and write, in the data directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Literal

import msgspec
from fastapi import APIRouter, Request, Response
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import FileResponse

from toka.config import Config
from toka.errors import RequestError
from toka.server.body import body_timeout, body_too_large
from toka.server.openapi import describe, describe_upload
from toka.server.request_context import current
from toka.server.serving import serving_of
from toka.server.store import MAX_PAGE, FileObject, Store

PURPOSE = "batch"
_FORM_OVERHEAD_BYTES = 64 * 1024  # of a form around its file

router = APIRouter()


class FileList(msgspec.Struct):
    data: list[FileObject]
    has_more: bool
    first_id: str | None
    last_id: str | None
    object: Literal["list"] = "list"


class FileDeleted(msgspec.Struct):
    id: str
    deleted: bool = True
    object: Literal["file"] = "file"


def store_of(request: Request) -> Store:
    """RequestError (404) if the server keeps no files."""
    store: Store | None = request.app.state.store
    if store is None:
        raise RequestError(
            "This server keeps no files; start it with data_dir=DIR.", status=404, code="files_not_configured"
        )
    return store


def json_reply(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


@router.post("/v1/files", openapi_extra=describe_upload(FileObject, (PURPOSE,)))
async def upload_file(request: Request) -> Response:
    """Keep a file for batches."""
    store = store_of(request)
    config = serving_of(request).config
    form = await _read_form(request, config)
    try:
        unknown = [name for name in form if name not in ("file", "purpose")]
        if unknown:
            raise RequestError(
                f"{unknown[0][:80]} is not supported by this version.", unknown[0][:80], code="unknown_field"
            )
        upload, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload, UploadFile):
            raise RequestError("file: is required, as a form's file.", "file")
        if purpose != PURPOSE:
            raise RequestError(f"purpose: must be {PURPOSE}.", "purpose")
        if (upload.size or 0) > config.max_file_bytes:
            raise body_too_large(config.max_file_bytes)
        filename = (upload.filename or "").replace("\\", "/").rpartition("/")[2] or "file"
        file = await store.run(store.add_upload, upload.file, current.get().caller, filename, PURPOSE)
    finally:
        await form.close()
    return json_reply(file)


@router.get("/v1/files", openapi_extra=describe(None, FileList))
async def list_files(
    request: Request, purpose: str | None = None, after: str | None = None, limit: int = MAX_PAGE, order: str = "desc"
) -> Response:
    """The files of this key, newest first."""
    store = store_of(request)
    check_query(request, "purpose", "after", "limit", "order")
    check_limit(limit, MAX_PAGE)
    if order not in ("asc", "desc"):
        raise RequestError("order: must be asc or desc.", "order")
    newest_first = order == "desc"
    files, has_more = await store.run(store.files, current.get().caller, purpose, after, limit, newest_first)
    return json_reply(FileList(files, has_more, files[0].id if files else None, files[-1].id if files else None))


@router.get("/v1/files/{file_id}", openapi_extra=describe(None, FileObject))
async def retrieve_file(request: Request, file_id: str) -> Response:
    """One file's facts."""
    store = store_of(request)
    return json_reply(await store.run(store.file, file_id, current.get().caller))


@router.get("/v1/files/{file_id}/content", response_class=FileResponse)
async def file_content(request: Request, file_id: str) -> Response:
    """What is in it."""
    store = store_of(request)
    file = await store.run(store.file, file_id, current.get().caller)
    return FileResponse(store.path_of(file), media_type="application/octet-stream", filename=file.filename)


@router.delete("/v1/files/{file_id}", openapi_extra=describe(None, FileDeleted))
async def delete_file(request: Request, file_id: str) -> Response:
    """Forget it, unless a batch still reads it."""
    store = store_of(request)
    await store.run(store.delete_file, file_id, current.get().caller)
    return json_reply(FileDeleted(file_id))


def check_query(request: Request, *known: str) -> None:
    """RequestError naming the first query parameter that is none of these."""
    for name in request.query_params:
        if name not in known:
            raise RequestError(f"{name[:80]} is not supported by this version.", name[:80], code="unknown_field")


def check_limit(limit: int, most: int) -> None:
    """RequestError unless a page may hold so many."""
    if not 1 <= limit <= most:
        raise RequestError(f"limit: must be between 1 and {most}.", "limit")


async def _read_form(request: Request, config: Config) -> FormData:
    """The multipart form, its file in a temporary one. RequestError: 400 if it is none, 413 if too large, 408 if it stops coming."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise RequestError("The request must be a multipart/form-data form.", code="invalid_form")
    try:
        async with aclosing(_bounded(request, config)) as stream:
            return await MultiPartParser(request.headers, stream, max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise RequestError(f"The form is not valid: {error.message[:120]}", code="invalid_form") from None


async def _bounded(request: Request, config: Config) -> AsyncGenerator[bytes, None]:
    """The body's chunks, each within the time that a whole body usually has."""
    most, size = config.max_file_bytes, 0
    chunks = aiter(request.stream())
    while True:
        try:
            async with asyncio.timeout(config.body_timeout_s):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise body_timeout(config.body_timeout_s) from None
        if chunk is None:
            return
        size += len(chunk)
        if size > most + _FORM_OVERHEAD_BYTES:
            raise body_too_large(most)
        yield chunk
