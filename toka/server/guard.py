"""The outermost layer of the application: request ids and the API key (plain ASGI)."""

from __future__ import annotations

import hmac
import re
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toka.errors import RequestError
from toka.server.error_replies import error_body, error_detail

OPEN_PATHS = ("/health", "/ready")  # load balancers and kubelets have no key
_REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


class Guard:
    """Wraps the application. api_key: what `Authorization: Bearer` must carry, None = anything goes.

    Every reply carries x-request-id: the client's own, if it is short and plain, else a new one.
    """

    def __init__(self, app: ASGIApp, api_key: str | None):
        self._app = app
        self._api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = (given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex).encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        if scope["path"] not in OPEN_PATHS and not self._has_key(headers.get("authorization", "")):
            wrong = RequestError("The API key is missing or wrong.", status=401, code="invalid_api_key")
            await _send_error(send_with_id, wrong)
            return
        await self._app(scope, receive, send_with_id)

    def _has_key(self, authorization: str) -> bool:
        if self._api_key is None:
            return True
        scheme, _, token = authorization.partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("utf-8"), self._api_key)


async def _send_error(send: Send, error: Exception) -> None:
    status, detail, headers = error_detail(error)
    body = error_body(detail)
    headers |= {"content-type": "application/json", "content-length": str(len(body))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
