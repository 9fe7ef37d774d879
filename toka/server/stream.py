"""Server-sent events: one chunk per token from a prepared template, and an eye on the client all the while."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import msgspec
import orjson
from msgspec import UNSET, UnsetType
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from toka.errors import TokaError
from toka.server.error_replies import error_body, error_detail
from toka.server.generation import Generation, TokenEvent
from toka.server.schemas import ErrorDetail, StreamOptions

logger = logging.getLogger("toka.server")

DONE = b"data: [DONE]\n\n"


def _error_chunk(detail: ErrorDetail) -> bytes:
    return b"data: " + error_body(detail) + b"\n\n"


_FULL_SOCKET_GRACE_S = 2.0  # for the error chunk of a failed generation to leave, if the client reads at all

Result = TypeVar("Result")


async def respond(
    request: Request,
    generation: Generation,
    *,
    abort: Callable[[], None],
    chunks: Callable[[AsyncIterator[list[TokenEvent]]], AsyncIterator[bytes]] | None,
    whole: Callable[[], msgspec.Struct],
    error_chunk: Callable[[ErrorDetail], bytes] = _error_chunk,
    done: bytes = DONE,
) -> Response:
    """The reply to a request whose generation runs: a stream of chunks if there is a maker of them, else `whole` at the end.

    abort ends the generation in the engine; it is called if the client leaves and on any error, and may be called twice. error_chunk: how
    a stream tells of an error; done: how it ends.
    """
    try:
        if chunks is not None:
            events = await while_connected(request.receive, first_events(generation), abort)
            return EventStream(chunks(events), generation, abort, error_chunk, done)
        await while_connected(request.receive, generation.finished(), abort)
    except BaseException:
        abort()
        raise
    return Response(msgspec.json.encode(whole()), media_type="application/json")


class ChunkTemplate:
    """Chunks that differ in the choice only. head: the JSON object's fields up to the choices, as bytes of a JSON object.

    delta_key: what stands before the text (`"text":` or `"delta":{"content":`) and after_text what closes it. options: what else the
    client wants to be told. usage: of now.
    """

    def __init__(
        self,
        head: dict[str, object],
        delta_key: bytes,
        after_text: bytes,
        *,
        options: StreamOptions | UnsetType,
        usage: Callable[[], msgspec.Struct],
    ):
        self._start = b"data: " + orjson.dumps(head)[:-1] + b',"choices":['
        self._delta_key = delta_key
        self._after_text = after_text
        self._usage = usage
        self._with_usage = options is not UNSET and options.include_usage
        self._usage_in_all = options is not UNSET and options.continuous_usage_stats
        self._end = b'}],"usage":null}\n\n' if self._with_usage else b"}]}\n\n"
        self._bare_start = b"data: " + orjson.dumps(head)[:-1] + b',"choices":[]'

    def token(self, event: TokenEvent, logprobs: bytes = b"null", more: bytes = b"") -> bytes:
        """The chunk of one token. logprobs: as JSON. more: further fields of the choice, `,"name":...` as JSON."""
        said = self._delta_key + orjson.dumps(event.text) + self._after_text
        return self.choice(event.choice, said, logprobs, event.finish_reason, more)

    def choice(
        self,
        index: int,
        said: bytes,
        logprobs: bytes = b"null",
        finish_reason: str | None = None,
        more: bytes = b"",
    ) -> bytes:
        """A chunk of one choice. said: `"text":"..."` or `"delta":{...}` as JSON."""
        reason = b"null" if finish_reason is None else b'"%b"' % finish_reason.encode()
        end = self._end if not self._usage_in_all else b'}],"usage":%b}\n\n' % msgspec.json.encode(self._usage())
        return b'%b{"index":%d,%b,"logprobs":%b,"finish_reason":%b%b%b' % (
            self._start, index, said, logprobs, reason, more, end,
        )  # fmt: skip

    def last(self, timings: Callable[[], msgspec.Struct] | None) -> bytes:
        """The chunk without choices that tells the usage and the timings, as far as they are wanted; nothing if none is."""
        fields = b""
        if self._with_usage:
            fields += b',"usage":' + msgspec.json.encode(self._usage())
        if timings is not None:
            fields += b',"timings":' + msgspec.json.encode(timings())
        return b"%b%b}\n\n" % (self._bare_start, fields) if fields else b""


async def first_events(generation: Generation) -> AsyncIterator[list[TokenEvent]]:
    """The generation's events, once there are any: errors before the first token are raised here, while the reply can still be
    an error with a status."""
    events = generation.events()
    first: list[TokenEvent] = await anext(events, [])

    async def all_events() -> AsyncIterator[list[TokenEvent]]:
        yield first
        async for batch in events:
            yield batch

    return all_events()


async def while_connected(receive: Receive, work: Awaitable[Result], on_disconnect: Callable[[], None]) -> Result:
    """The result of work, unless the client leaves before: then on_disconnect is called and ClientDisconnect raised."""
    watch = asyncio.create_task(_disconnected(receive))
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait((watch, task), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return await task
        on_disconnect()
        raise ClientDisconnect
    finally:
        for pending in (watch, task):
            pending.cancel()
        await asyncio.gather(watch, task, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of chunks. chunks: made from the generation's events; on_end: called once, however the stream ends.

    An error on the way becomes an error chunk; the last thing sent is `done`, unless the client is gone or stuck.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        generation: Generation,
        on_end: Callable[[], None],
        error_chunk: Callable[[ErrorDetail], bytes],
        done: bytes,
    ):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._generation = generation
        self._on_end = on_end
        self._error_chunk, self._done = error_chunk, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send_all(send))
        watchers = [asyncio.create_task(_disconnected(receive)), asyncio.create_task(self._stuck())]
        try:
            await asyncio.wait((sender, *watchers), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                await sender
            elif watchers[1].done():
                logger.warning("A client that does not read its stream is cut off.")  # by returning without an end
        finally:
            self._on_end()
            for task in (sender, *watchers):
                task.cancel()
            await asyncio.gather(sender, *watchers, return_exceptions=True)

    async def _stuck(self) -> None:
        await self._generation.failed.wait()
        await asyncio.sleep(_FULL_SOCKET_GRACE_S)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for data in self._chunks:
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TokaError as error:
            _, detail, _ = error_detail(error)
            await send({"type": "http.response.body", "body": self._error_chunk(detail), "more_body": True})
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": self._done, "more_body": False})
