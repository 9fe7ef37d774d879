"""The OpenAPI description of bodies and replies, from the same structs that check and write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from toka.server.schemas import NEUTRAL_VALUES, ErrorReply

_REFERENCE = "#/components/schemas/{name}"
_described: dict[str, type[msgspec.Struct]] = {"ErrorReply": ErrorReply}


def describe(
    request: type[msgspec.Struct] | None, reply: type[msgspec.Struct], *, streams: bool = False
) -> dict[str, Any]:
    """`openapi_extra` of a route that parses its own body as request and answers with reply."""
    for schema in (request, reply):
        if schema is not None:
            _described[schema.__name__] = schema
    extra = _replies(reply, streams=streams)
    if request is not None:
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": _reference(request)}}}
    return extra


def describe_upload(reply: type[msgspec.Struct], purposes: tuple[str, ...]) -> dict[str, Any]:
    """`openapi_extra` of a route that takes a form with a file and its purpose, and answers with reply."""
    _described[reply.__name__] = reply
    form = {
        "type": "object",
        "required": ["file", "purpose"],
        "additionalProperties": False,
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "purpose": {"type": "string", "enum": list(purposes)},
        },
    }
    body = {"required": True, "content": {"multipart/form-data": {"schema": form}}}
    return {**_replies(reply), "requestBody": body}


def _replies(reply: type[msgspec.Struct], *, streams: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(reply)}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "responses": {
            "200": {"description": "The reply.", "content": content},
            "default": {
                "description": "An error.",
                "content": {"application/json": {"schema": _reference(ErrorReply)}},
            },
        }
    }


def _reference(schema: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=schema.__name__)}


def add_openapi(app: FastAPI) -> None:
    """Make /openapi.json tell what the endpoints really take."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            spec = get_openapi(title=app.title, version=app.version, routes=app.routes)
            spec.setdefault("components", {}).setdefault("schemas", {}).update(_components(_described.values()))
            app.openapi_schema = spec
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _components(schemas: Iterable[type[msgspec.Struct]]) -> dict[str, Any]:
    _, components = msgspec.json.schema_components(schemas, ref_template=_REFERENCE)
    for schema, neutral in NEUTRAL_VALUES.items():
        component = components[schema.__name__]
        component["additionalProperties"] = False
        for name, values in neutral.items():
            component["properties"][name] = {
                "enum": [*values, None],
                "description": "Not supported yet: only a value that changes nothing is accepted.",
            }
    return components
