"""From the bytes of a request to a checked struct; every fault is a RequestError (400 or 413) that names the field."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from toka.errors import RequestError
from toka.server.schemas import NEUTRAL_VALUES, REPLACED_FIELDS

MAX_BODY_BYTES = 32 * 2**20

Schema = TypeVar("Schema", bound=msgspec.Struct)

_PATH = re.compile(r" - at `(?:key in )?\$\.?([^`]*)`$")


async def read_body(request: Request, schema: type[Schema]) -> Schema:
    """The request's JSON body as a schema."""
    return parse_body(await _read_bounded(request), schema)


async def _read_bounded(request: Request) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise RequestError(
                f"The request body is larger than {MAX_BODY_BYTES} bytes.", status=413, code="request_too_large"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def parse_body(data: bytes, schema: type[Schema]) -> Schema:
    """data as a schema. Raises RequestError: for what is no JSON object, wrong types, and any field not supported."""
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The request body is not valid JSON: {_short(str(error))}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError("The request body must be a JSON object.", code="invalid_json")
    try:
        return msgspec.convert(_supported_fields(fields, schema), schema)
    except (msgspec.ValidationError, OverflowError) as error:
        raise _named(str(error)) from None


def _supported_fields(fields: dict[str, Any], schema: type[msgspec.Struct]) -> dict[str, Any]:
    supported, neutral = set(schema.__struct_fields__), NEUTRAL_VALUES[schema]
    kept = {}
    for name, value in fields.items():
        if name in supported:
            if value is not None:
                kept[name] = value
        elif name not in neutral:
            raise RequestError(f"{_short(name)} is not supported by this version.", _short(name), code="unknown_field")
        elif not (value is None or _is_neutral(value, neutral[name])):
            instead = f"say {REPLACED_FIELDS[name]} instead" if name in REPLACED_FIELDS else "leave it out"
            raise RequestError(f"{name} is not supported yet by this version; {instead}.", name, code="unsupported")
    return kept


def _is_neutral(value: Any, allowed: tuple[Any, ...]) -> bool:
    # bool is an int to Python: without this, `logprobs: 0`, which asks for something, would pass for false
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in allowed)


def _named(message: str) -> RequestError:
    """msgspec's message, rewritten to name the field the way clients write it."""
    found = _PATH.search(message)
    what = message[: found.start()] if found else message
    path = found.group(1) if found else ""
    missing = re.match(r"Object (missing required|contains unknown) field `([^`]*)`", what)
    if missing:
        path = f"{path}.{missing.group(2)}" if path else missing.group(2)
        known = missing.group(1) == "missing required"
        what = "is required" if known else "is not supported by this version"
    path = _short(path)
    text = f"{path}: {_short(what)}." if path else f"{_short(what)}."
    return RequestError(text, re.split(r"[.\[]", path)[0] or None)


def _short(text: str) -> str:
    return text if len(text) <= 120 else text[:117] + "..."
