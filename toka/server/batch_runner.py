"""Runs batches: each line of a file is a request, made of the application itself, after everything that people wait for."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec
from starlette.types import ASGIApp, Message, Scope

from toka.errors import RequestError
from toka.log import request_id as logged_request_id
from toka.server.keys import ANYBODY, Caller
from toka.server.request_context import RequestContext, current
from toka.server.serving import Serving
from toka.server.store import Batch, BatchError, BatchErrors, BatchStatus, Store

logger = logging.getLogger("toka.server")

LEAST_PRIORITY = 1_000_000  # behind all whom people wait for
MAX_ERRORS_TOLD = 100
_MAX_OPEN_FILES = 64  # batches that run at once; the others wait
_MAX_CUSTOM_ID_CHARS = 512
_RETRY_S = 1.0  # after a refusal for want of room that does not say when to come back


class _Line(msgspec.Struct):
    """One line of an input file."""

    custom_id: str
    method: Literal["POST"]
    url: str
    body: msgspec.Raw


class _Body(msgspec.Struct):
    """What has to be known of a request before it is made."""

    stream: bool | None = None


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _LineError(msgspec.Struct):
    code: str
    message: str


class _Outcome(msgspec.Struct):
    """One line of an output or error file."""

    id: str
    custom_id: str
    response: _Response | None
    error: _LineError | None


class BatchRunner:
    """One task for each batch that is not finished; all share a number of lines under way.

    app: answers the lines. endpoints: paths of it that lines may ask.
    """

    def __init__(self, store: Store, app: ASGIApp, serving: Serving, endpoints: tuple[str, ...]):
        self.store, self.app, self.serving, self.endpoints = store, app, serving, endpoints
        self.room = asyncio.Semaphore(serving.config.batch_concurrency)
        self.open_files = asyncio.Semaphore(_MAX_OPEN_FILES)
        self._runs: dict[str, tuple[_Run, asyncio.Task[None]]] = {}

    async def start(self) -> None:
        """Go on with what an earlier server left."""
        for batch, owner in await self.store.run(self.store.unfinished_batches):
            self.begin(batch, owner)

    async def close(self) -> None:
        """Stop; what has not ended begins anew with the next server."""
        tasks = [task for _, task in self._runs.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self.store.close)

    def begin(self, batch: Batch, owner: str) -> None:
        """Run it, from where it stands."""
        run = _Run(self, batch, owner)
        task = asyncio.create_task(run.to_its_end(), name=batch.id)
        self._runs[batch.id] = (run, task)
        task.add_done_callback(lambda _: self._runs.pop(batch.id))

    async def cancel(self, batch_id: str) -> bool:
        """Whether it could be; it ends as soon as what it has is written."""
        if batch_id not in self._runs:
            return False
        return await self._runs[batch_id][0].cancel()


class _Run:
    """One batch, from validation to its output file."""

    def __init__(self, runner: BatchRunner, batch: Batch, owner: str):
        self._runner, self._store, self._batch, self._owner = runner, runner.store, batch, owner
        self._cancelled = asyncio.Event()
        if batch.status == "cancelling":
            self._cancelled.set()

    async def to_its_end(self) -> None:
        batch = self._batch
        try:
            path = self._store.path_of(await self._store.run(self._store.file, batch.input_file_id, _ADMIN))
            if batch.status == "validating":
                await self._validate(path)
            if batch.status in ("in_progress", "cancelling"):
                await self._run_lines(path)
            if batch.status in ("finalizing", "cancelling"):
                await self._finish(path)
        except Exception:
            logger.exception("The batch %s could not be run to its end.", batch.id)
            errors = [BatchError("internal_error", "The batch could not be run to its end; the server's log has more.")]
            await self._fail(errors)

    async def cancel(self) -> bool:
        """Whether it could still be."""
        if self._batch.status not in ("validating", "in_progress"):
            return self._batch.status == "cancelling"
        self._batch.cancelling_at = int(time.time())
        await self._enter("cancelling")
        self._cancelled.set()
        return True

    async def _enter(self, status: BatchStatus) -> None:
        self._batch.status = status
        await self._store.run(self._store.save_batch, self._batch)

    # -------------------------------------------------------------------------------------------------------- validation

    async def _validate(self, path: Path) -> None:
        config = self._runner.serving.config
        total, errors = await asyncio.to_thread(
            _check_input, path, self._batch.endpoint, config.max_batch_requests, config.max_body_bytes
        )
        self._batch.request_counts.total = total
        if errors:
            await self._fail(errors)
        elif self._batch.status == "validating":  # nobody has cancelled it meanwhile
            self._batch.in_progress_at = int(time.time())
            await self._enter("in_progress")

    async def _fail(self, errors: list[BatchError]) -> None:
        self._batch.errors = BatchErrors(errors[:MAX_ERRORS_TOLD])
        self._batch.failed_at = int(time.time())
        await self._enter("failed")

    # ------------------------------------------------------------------------------------------------------------- lines

    async def _run_lines(self, path: Path) -> None:
        """Until all lines have ended, somebody cancels, or time is up; then the batch is finalizing, or cancelling."""
        work = asyncio.create_task(self._answer_lines(path))
        cancelled = asyncio.create_task(self._cancelled.wait())
        try:
            left_s = max(self._batch.expires_at - time.time(), 0.0)
            await asyncio.wait((work, cancelled), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped = not work.done()
            for task in (work, cancelled):
                task.cancel()
            await asyncio.gather(work, cancelled, return_exceptions=True)
        if not stopped:
            await work  # raises what went wrong
        if self._batch.status == "in_progress":
            self._batch.finalizing_at = int(time.time())
            await self._enter("finalizing")

    async def _answer_lines(self, path: Path) -> None:
        await self._runner.serving.engine.became_ready.wait()
        room = self._runner.room
        async with self._runner.open_files, asyncio.TaskGroup() as group:
            finished = await self._store.run(self._store.finished_lines, self._batch)
            counts = self._batch.request_counts
            counts.failed = sum(finished.values())
            counts.completed = len(finished) - counts.failed
            for number, line in _lines(path):
                if number in finished:
                    continue
                await room.acquire()
                task = group.create_task(self._answer(number, line))
                task.add_done_callback(lambda _: room.release())

    async def _answer(self, number: int, data: bytes) -> None:
        """Make the line's request, again and again while the server says that it is full, and keep the reply."""
        line = msgspec.json.decode(data, type=_Line)
        while True:
            context = RequestContext(uuid.uuid4().hex, Caller(self._owner, is_admin=False), LEAST_PRIORITY)
            status, headers, body = await _reply_of(self._runner.app, line.url, bytes(line.body), context)
            if headers.get("x-should-retry") != "true":
                break
            await asyncio.sleep(float(headers.get("retry-after", _RETRY_S)))
        is_error = not 200 <= status < 300
        counts = self._batch.request_counts
        if is_error:
            counts.failed += 1
        else:
            counts.completed += 1
        outcome = _Outcome(
            f"batch_req_{context.request_id}",
            line.custom_id,
            _Response(status, context.request_id, msgspec.Raw(body)),
            None,
        )
        await asyncio.shield(  # counted and kept together
            self._store.run(self._store.add_result, self._batch, number, msgspec.json.encode(outcome), is_error)
        )

    # --------------------------------------------------------------------------------------------------------------- end

    async def _finish(self, path: Path) -> None:
        batch, now = self._batch, int(time.time())
        finished = await self._store.run(self._store.finished_lines, batch)
        unfinished: Iterator[bytes] = iter(())
        if batch.status == "cancelling":
            batch.status, batch.cancelled_at = "cancelled", now
        elif len(finished) < batch.request_counts.total:
            batch.status, batch.expired_at = "expired", now
            unfinished = _expired(path, finished)
        else:
            batch.status, batch.completed_at = "completed", now
        await self._store.run(self._store.finish_batch, batch, self._owner, unfinished)


_ADMIN = ANYBODY._replace(is_admin=True)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, numbered from 1."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line


def _expired(path: Path, finished: dict[int, bool]) -> Iterator[bytes]:
    error = _LineError("batch_expired", "This request could not be run before the completion window ended.")
    for number, data in _lines(path):
        if number not in finished:
            line = msgspec.json.decode(data, type=_Line)
            yield msgspec.json.encode(_Outcome(f"batch_req_{uuid.uuid4().hex}", line.custom_id, None, error))


def _check_input(path: Path, endpoint: str, max_lines: int, max_body_bytes: int) -> tuple[int, list[BatchError]]:
    """The number of lines, and what is wrong with them."""
    errors: list[BatchError] = []
    seen: set[str] = set()
    total = 0
    for number, data in _lines(path):
        total += 1
        if total > max_lines:
            return total, [BatchError("too_many_requests", f"The file has more than {max_lines} requests.")]
        try:
            custom_id = _check_line(data, endpoint, max_body_bytes)
            if custom_id in seen:
                raise RequestError("custom_id is used by an earlier line.", "custom_id", code="duplicate_custom_id")
            seen.add(custom_id)
        except RequestError as error:
            errors.append(BatchError(error.code or "invalid_request", error.message, number, error.param))
            if len(errors) == MAX_ERRORS_TOLD:
                break
    if not total:
        errors.append(BatchError("empty_file", "The file has no requests."))
    return total, errors


def _check_line(data: bytes, endpoint: str, max_body_bytes: int) -> str:
    """The line's custom_id; RequestError naming what is wrong with the line."""
    try:
        line = msgspec.json.decode(data, type=_Line)
        body = msgspec.json.decode(line.body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The line is not a valid request: {str(error)[:200]}.", code="invalid_json_line") from None
    if not 1 <= len(line.custom_id) <= _MAX_CUSTOM_ID_CHARS:
        raise RequestError(f"custom_id must have 1 to {_MAX_CUSTOM_ID_CHARS} characters.", "custom_id")
    if line.url != endpoint:
        raise RequestError(f"url must be the batch's endpoint, {endpoint}.", "url", code="invalid_url")
    if len(line.body) > max_body_bytes:
        raise RequestError(f"The body is larger than {max_body_bytes} bytes.", "body", code="request_too_large")
    if body.stream:
        raise RequestError("A batch's requests cannot be streamed.", "stream")
    return line.custom_id


async def _reply_of(app: ASGIApp, path: str, body: bytes, context: RequestContext) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the application's reply to a POST, made in this context."""
    current.set(context)
    logged_request_id.set(context.request_id)
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
        "state": {},
    }
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    status, headers, chunks = 0, {}, []

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # this client does not leave
        raise AssertionError("an event that nobody sets was set")

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            chunks.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # Starlette raises what it has answered with a 500
        logger.exception("A batch's request failed.")
    return status, headers, b"".join(chunks)
