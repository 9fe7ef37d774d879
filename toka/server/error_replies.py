"""Every error as a reply in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`, with the retry headers."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from toka.errors import CapacityError, EngineDeadError, RequestError, TokaError
from toka.server.engine_client import RETRY_AFTER_S
from toka.server.generation import DeadlineError, SampleFailedError
from toka.server.schemas import ErrorDetail, ErrorReply

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "internal_server_error",
    503: "service_unavailable_error",
}
CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it


def error_detail(error: Exception) -> tuple[int, ErrorDetail, dict[str, str]]:
    """HTTP status, body and headers for error; anything not raised on purpose is a 500 that tells nothing of its inside."""
    if isinstance(error, RequestError):
        return _reply(error.status, error.message, error.param, error.code, retry_after_s=None)
    if isinstance(error, CapacityError):
        return _reply(error.status, error.message, None, "overloaded", retry_after_s=error.retry_after_s)
    if isinstance(error, SampleFailedError):
        return _reply(500, str(error), None, "sample_failed", retry_after_s=None)
    if isinstance(error, DeadlineError):
        return _reply(503, str(error), "deadline_s", "deadline_exceeded", retry_after_s=None)
    if isinstance(error, EngineDeadError):
        return _reply(503, str(error), None, "engine_dead", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, HTTPException):
        return _reply(error.status_code, str(error.detail), None, None, retry_after_s=None, headers=error.headers)
    if isinstance(error, RequestValidationError):  # only of a path or a query: bodies are parsed in body.py
        fault = error.errors()[0]
        name = str(fault["loc"][-1])
        return _reply(400, f"{name}: {fault['msg'][:200]}.", name, None, retry_after_s=None)
    return _reply(500, "An internal error; the server's log has more.", None, None, retry_after_s=None)


def _reply(
    status: int,
    message: str,
    param: str | None,
    code: str | None,
    *,
    retry_after_s: int | None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, ErrorDetail, dict[str, str]]:
    detail = ErrorDetail(message, _TYPES.get(status, "invalid_request_error"), param, code)
    retry = {"x-should-retry": "false"}
    if retry_after_s is not None:
        retry = {"x-should-retry": "true", "retry-after": str(retry_after_s)}
    return status, detail, {**(headers or {}), **retry}


def error_body(detail: ErrorDetail) -> bytes:
    return msgspec.json.encode(ErrorReply(detail))


async def reply_to_error(_request: Request, error: Exception) -> Response:
    """FastAPI's handler for all the errors that `add_error_handlers` lists."""
    status, detail, headers = error_detail(error)
    return Response(error_body(detail), status, headers, "application/json")


async def _nobody_listens(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def add_error_handlers(app: FastAPI) -> None:
    """Answer every error of an endpoint in OpenAI's form, FastAPI's and Starlette's own included."""
    for kind in (TokaError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, reply_to_error)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)
