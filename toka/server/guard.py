"""The outermost layer of the application (plain ASGI): who may come in and how many at once, request ids, counts, a line in the log."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toka.config import Config
from toka.errors import CapacityError, RequestError, TokaError
from toka.log import request_id as logged_request_id
from toka.metrics import Metrics
from toka.server.error_replies import CLIENT_CLOSED_REQUEST, error_body, error_detail
from toka.server.keys import ANYBODY, Caller, KeyRing, shown_key
from toka.server.request_context import RequestContext, current

logger = logging.getLogger("toka.requests")

OPEN_PATHS = ("/", "/health", "/ready")  # load balancers and kubelets have no key; the page asks for it
_WITHOUT_LIMIT = ("/health", "/ready")  # a full server is healthy
_POLLED_PATHS = ("/health", "/ready", "/metrics", "/status")  # a line for each would bury the others
_METRICS_PATHS = ("/metrics", "/status", "/status/report")
_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class Guard:
    """Wraps the application.

    Every reply carries x-request-id: the client's own, if it is short and plain, else a new one.
    """

    def __init__(self, app: ASGIApp, config: Config, keys: KeyRing, metrics: Metrics):
        self._app = app
        self._keys = keys
        self._admin_metrics = config.admin_metrics
        self._max_concurrent = config.max_concurrent_requests
        self._log_requests, self._log_prompts = config.log_requests, config.log_prompts
        self._metrics = metrics
        self._num_open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), CLIENT_CLOSED_REQUEST
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        context = RequestContext(
            given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
            traceparent=headers.get("traceparent", ""),
            keep_body=self._log_prompts,
        )
        current.set(context)
        logged_request_id.set(context.request_id)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", context.request_id.encode())]
            await send(message)

        self._num_open += 1
        try:
            context.caller = self._let_in(scope["path"], shown_key(headers))
        except TokaError as error:
            await _send_error(send_with_id, error)
        else:
            await self._app(scope, receive, send_with_id)
        finally:
            self._num_open -= 1
            self._metrics.count_http_request(_handler(scope), scope["method"], status)
            if self._log_requests and not (scope["path"] in _POLLED_PATHS and status == 200):
                _log_request(scope, context, status, time.perf_counter() - start)

    def _let_in(self, path: str, key: str) -> Caller:
        """Who calls. RequestError (401, 403) if it may not, CapacityError (429) if there is no room."""
        if path not in _WITHOUT_LIMIT and self._num_open > self._max_concurrent:
            raise CapacityError(f"The server answers {self._max_concurrent} requests at once; it is full.")
        caller = self._keys.caller(key)
        if caller is None:
            if path in OPEN_PATHS:
                return ANYBODY
            raise RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")
        if self._admin_metrics and path in _METRICS_PATHS and not caller.is_admin:
            raise RequestError(f"{path} is for the admin key.", status=403, code="admin_only")
        return caller


def _handler(scope: Scope) -> str:
    """The route's path as written in the code: one name per route, whatever clients ask for."""
    path: str = getattr(scope.get("route"), "path", "none")
    return path


def _log_request(scope: Scope, context: RequestContext, status: int, duration_s: float) -> None:
    client = scope.get("client")
    fields: dict[str, object] = {
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_s": round(duration_s, 6),
        "client": client[0] if client else "",
        "key": context.caller.owner,
    }
    for generation in context.generations:
        fields |= generation.summary()
    if context.body:
        fields["body"] = context.body.decode(errors="replace")
    logger.info(
        "%s %s %d in %.3f s (%s)",
        scope["method"],
        scope["path"].encode("ascii", "backslashreplace").decode(),
        status,
        duration_s,
        context.request_id,
        extra={"fields": fields},
    )


async def _send_error(send: Send, error: TokaError) -> None:
    status, detail, headers = error_detail(error)
    body = error_body(detail)
    headers |= {"content-type": "application/json", "content-length": str(len(body))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
